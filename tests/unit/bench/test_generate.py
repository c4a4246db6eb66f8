"""`bench generate` times what it says: the same backbone with each head, as many tokens each."""

import json

import pytest

from megatron_bit.bench import generate
from megatron_bit.config import load_config


@pytest.mark.parametrize("kind", ["chain", "diffusion"])
def test_rows_and_sizes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(preset="laptop", overrides=[f"model.head.kind={kind}", "model.num_layers=2"])
    how = {"vocab_size": 500, "batches": (1, 3), "steps": (2, 3), "tokens": 5, "prompt": 4, "repeats": 2}
    generate.main(config, **how, as_json=True)
    result = json.loads(capsys.readouterr().out)
    ours = ["BitLM, chain"] if kind == "chain" else ["BitLM, 2 steps", "BitLM, 3 steps"]
    assert [(row["batch"], row["model"]) for row in result["rows"]] == [
        (batch, name) for batch in (1, 3) for name in (*ours, "softmax peer", "Llama")
    ]
    expected = {"BitLM, chain": 8, "BitLM, 2 steps": 2, "BitLM, 3 steps": 3}
    for row in result["rows"]:
        assert row["evaluations"] == expected.get(row["model"])
        assert 0 < row["tokens_per_second"]["min"] <= row["tokens_per_second"]["median"]
        for peer, times in row["times"].items():
            assert (times["median"] == 1.0) == (peer == row["model"])
    sizes = result["parameters"]
    assert sizes["softmax peer"] - sizes["Llama"] == 2 * 2 * 64, "norms of queries and keys"
    assert sizes["Llama"] > 2 * 500 * 256
    assert result["machine"].endswith("torch.float32"), "what `generate` computes in"
    generate.main(config, **how, dtype="bfloat16", as_json=False)
    out = capsys.readouterr().out
    assert "times softmax peer" in out and out.splitlines()[0].endswith("torch.bfloat16")
