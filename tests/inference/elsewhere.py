"""Runs in an environment without this project: what a user of transformers gets from converted folders.

    python elsewhere.py CASES.json OUT.safetensors

CASES.json maps a name to a folder; its inputs are in CASES.json.NAME, a safetensors file.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def saved_again(model: Any, folder: Path) -> Any:
    """The model out of what `save_pretrained` writes: with all of its code."""
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        for file in folder.glob("*.py"):
            assert Path(again, file.name).read_bytes() == file.read_bytes(), file.name
        config = json.loads(Path(again, "config.json").read_text())
        assert config["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
        return AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)


def main() -> None:
    absent = ("megatron_bit", "mbit_kernels", "mbit_data", "sentencepiece_model_pb2")
    found = [name for name in absent if importlib.util.find_spec(name)]
    assert not found, f"{found} can be imported: this environment proves nothing"
    torch.set_num_threads(1)
    out = {}
    for name, folder in json.loads(Path(sys.argv[1]).read_text()).items():
        given = load_file(f"{sys.argv[1]}.{name}")
        model = saved_again(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chain = model.config.head_kind == "chain"
        noisy = {} if chain else {"noisy_bits": given["noisy_bits"].float(), "log_sigma": given["log_sigma"]}
        with torch.no_grad():
            parts = model(given["tokens"], **noisy)
        score = model.score(given["tokens"], noise_samples=3, seed=11, sequence_ids=given["sample"])
        prompts = tokenizer(["def f(", "import os, sys\nclass "], padding=True, return_tensors="pt")
        how = {} if chain else {"steps": 6}
        text = model.generate(**prompts, max_new_tokens=17, seed=5, sequence_ids=[40, 2**40], **how)
        results = {
            "states": parts.last_hidden_state.float(),
            "residual": torch.zeros(1) if chain else parts.logits.float(),
            "nats": score.nats,
            "nats_per_token": score.nats_per_token,
            "text": text[:, prompts.input_ids.shape[1] :],
            "special": tokenizer("</s> a", return_tensors="pt").input_ids,
        }
        if chain and model.dtype == torch.float32:  # the way that takes no tensor in hand
            pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
            (said,) = pipe("def f(", max_new_tokens=17, seed=5, temperature=1.0, return_full_text=False)
            alone = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=17, seed=5)[0]
            assert tokenizer.decode(alone, skip_special_tokens=True) == "def f(" + said["generated_text"], said
        out.update({f"{name}/{key}": value.contiguous() for key, value in results.items()})
    assert "megatron_bit" not in sys.modules
    save_file(out, sys.argv[2])


if __name__ == "__main__":
    main()
