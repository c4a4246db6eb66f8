"""A new run starts with given weights: a checkpoint's, a converted folder's, or the layers of a Llama or Qwen3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import world
from gloo_ranks import run_ranks

from megatron_bit.run.checkpoints import complete

HEAD_DIM = {"llama": 12, "qwen3": 20}  # hidden size / heads, and what is not
GQA = {"model.num_kv_heads": 2, "model.norm_eps": 1e-6, "train.steps": 2}


def _start(run: Path, data: Path, world: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    """Start a run; returns its weights at step 0."""
    arguments = tiny_runs.overrides(run, data, {**GQA, "checkpoint.initial": True, **settings})
    assert set(run_ranks(tiny_runs.train, world, arguments)) == {0}
    return tiny_runs.read_state(complete(run / "checkpoints")[0], "param")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("init") / "run"
    _start(run, tiny_data)
    return run


def _llama(folder: Path, kind: str) -> Any:
    """A random model of transformers with the sizes of tiny_runs, saved to `folder`."""
    import transformers

    names = {"llama": ("LlamaConfig", "LlamaModel"), "qwen3": ("Qwen3Config", "Qwen3Model")}[kind]
    config_class, model_class = (getattr(transformers, name) for name in names)
    config = config_class(
        vocab_size=11, hidden_size=48, intermediate_size=88, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, head_dim=HEAD_DIM[kind], rope_theta=10000.0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    causal = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    whole = getattr(transformers, causal)(config)
    whole.model = model
    whole.save_pretrained(folder)
    return model


def test_a_checkpoint_of_another_layout(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = complete(trained / "checkpoints")[-1]
    weights = _start(tmp_path / "run", tiny_data, 4, **{"train.init_from": source, "parallel.tp": 2, "parallel.pp": 2})
    assert tiny_runs.worst(weights, tiny_runs.read_state(source, "param"))[0] == 0.0
    assert tiny_runs.worst(weights, _start(tmp_path / "other", tiny_data, **{"train.seed": 5}))[0] > 0.01


def test_the_run_goes_on_from_its_own_checkpoint(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings = {"train.init_from": trained, "checkpoint.keep": 9}
    _start(tmp_path / "run", tiny_data, **settings, **{"train.stop_at": 1})
    _start(tmp_path / "run", tiny_data, **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2]


def test_a_converted_folder_and_back_to_the_bit(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.inference.convert import to_hf

    to_hf(trained, tmp_path / "hf", data=str(tiny_data))
    weights = _start(tmp_path / "run", tiny_data, 2, **{"train.init_from": tmp_path / "hf", "parallel.tp": 2})
    newest = complete(trained / "checkpoints")[-1]
    assert tiny_runs.worst(weights, tiny_runs.read_state(newest, "param"))[0] == 0.0


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_layers_of_an_ar_model(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """The backbone, given the same input, gives what transformers' model gives."""
    from megatron_bit.config import load_config
    from megatron_bit.model.build import build_model

    model = _llama(tmp_path / "hf", kind)
    settings = {"train.init_from": tmp_path / "hf", "model.qk_norm": kind == "qwen3"}
    settings |= {"model.head_dim": HEAD_DIM[kind]}
    weights = _start(tmp_path / "run", tiny_data, 2, **settings, **{"parallel.tp": 2})
    config = load_config(None, tiny_runs.overrides(tmp_path / "x", tiny_data, {**GQA, **settings}))
    chunk = build_model(config, 421, world.of_one())[0]
    from megatron_bit.checkpoint.load import load_weights

    load_weights(complete(tmp_path / "run" / "checkpoints")[0], [chunk], world.of_one())
    x = torch.randn(2, 36, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = chunk.backbone(x.transpose(0, 1).contiguous()).transpose(0, 1)
        theirs = model(inputs_embeds=x, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    untouched = _start(tmp_path / "plain", tiny_data, **{"model.qk_norm": kind == "qwen3"})
    assert torch.equal(weights["head.input.weight"], untouched["head.input.weight"])


BAD = {
    "head_dim": ({"model.head_dim": 16}, "model.head_dim is 12 there and 16 here; set model.head_dim=12"),
    "sizes": ({"model.num_layers": 4}, "model.num_layers is 5 there and 4 here; set model.num_layers=5"),
    "qk_norm": ({"model.qk_norm": True}, "set model.qk_norm=false"),
    "nothing": ({"train.init_from": "/nowhere"}, "/nowhere has no complete checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_do_not_fit(name: str, tiny_data: Path, tmp_path: Path) -> None:
    _llama(tmp_path / "hf", "llama")
    settings, message = BAD[name]
    arguments = {"train.init_from": tmp_path / "hf", "model.qk_norm": False, **settings}
    with pytest.raises(AssertionError, match=f"UserError: .*{message}"):
        _start(tmp_path / "run", tiny_data, 2, **arguments)
    assert not (tmp_path / "run" / "identity.json").exists()  # the same command with the right keys may use the folder


def test_weights_of_other_tokens(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.inference.convert import to_hf

    with pytest.raises(AssertionError, match=r"UserError: train.init_from .*model.code is binary there and gray here"):
        _start(tmp_path / "a", tiny_data, **{"train.init_from": trained, "model.code": "gray"})
    to_hf(trained, tmp_path / "hf", data=str(tiny_data))
    with pytest.raises(
        AssertionError, match=r"UserError: .*hf is of another model: model.code is binary there and gray"
    ):
        _start(tmp_path / "b", tiny_data, **{"train.init_from": tmp_path / "hf", "model.code": "gray"})


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the same vocabulary size as tiny_data's, and another tokenizer."""
    import asyncio

    from mbit_data.prepare import PrepareOptions, prepare

    inputs = (str(Path(asyncio.__file__).parent),)
    out = tmp_path_factory.mktemp("other") / "data"
    return prepare(PrepareOptions(inputs, out, vocab_size=421, workers=1), progress=False).folder


KINDS = {
    "chain": {"model.head.kind": "chain", "model.group_bits": 5},
    "memory": {
        "model.head.kind": "chain",
        "model.group_bits": 4,
        "model.memory.rows": 50,
        "model.memory.orders": [3, 1],
    },
    "softmax": {"model.head.kind": "softmax", "model.block_size": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_tokenizer(kind: str, tiny_data: Path, other_tokens: Path, tmp_path: Path) -> None:
    """Of the same size, so that every shape fits: refused from the run, from its converted folder, and as a new run."""
    from megatron_bit.errors import UserError
    from megatron_bit.inference.convert import to_hf

    _start(tmp_path / "run", tiny_data, **KINDS[kind])
    to_hf(tmp_path / "run", tmp_path / "hf")
    for source in (tmp_path / "run", tmp_path / "hf"):
        with pytest.raises(AssertionError, match=rf"UserError: train.init_from {source}.*tokenizer is [0-9a-f]{{64}} "):
            _start(tmp_path / "new", other_tokens, **KINDS[kind], **{"train.init_from": source})
    with pytest.raises(
        UserError, match=r"hf is of another model: tokenizer is [0-9a-f]{64} there and [0-9a-f]{64} here; give"
    ):
        _to_run(tmp_path / "hf", tmp_path / "made", other_tokens, **(KINDS[kind] if kind == "softmax" else {}))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["tokenizer_sha256"]  # of an older version
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="convert again what an older version converted"):
        _to_run(tmp_path / "hf", tmp_path / "made", tiny_data, **(KINDS[kind] if kind == "softmax" else {}))


def test_damaged_weights(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(complete(trained / "checkpoints")[-1], tmp_path / "step-00000002"))
    path = source / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match=r"UserError: train.init_from .*rank-00000.safetensors has changed"):
        _start(tmp_path / "run", tiny_data, 2, **{"train.init_from": source, "parallel.tp": 2})


def _to_run(source: Path, run: Path, data: Path, **settings: Any) -> Path:
    """`convert --from hf --to run`, with the training of tiny_runs; the checkpoint of step 0."""
    from megatron_bit.inference.from_hf import to_run

    own = {k: v for k, v in {**tiny_runs.SETTINGS, **GQA}.items() if not k.startswith("model.")} | {"data.path": data}
    to_run(source, run, None, tuple(f"{key}={value}" for key, value in {**own, **settings}.items()))
    (checkpoint,) = complete(run / "checkpoints")
    assert checkpoint.name == "step-00000000"
    return checkpoint


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "diffusion": {"diffusion.self_condition": 0.5, "model.code": "gray", "model.head_dim": 18},
    "chain": {"model.head.kind": "chain", "model.group_bits": 5, "optim.ema_decay": 0.9, "model.head.prior": False},
    "names": {
        "model.head.kind": "chain", "model.group_bits": 4, "model.names": "pairs", "model.head.prior_rank": 6,
        "diffusion.noisy_every": 3,
    },
    "seeing": {"model.group_bits": 4, "model.head.token_before": True, "model.head.soft_prior": True,
               "diffusion.levels_apart": 1},
    "softmax": {"model.head.kind": "softmax", "model.block_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_a_run_to_a_folder_and_back_to_a_run(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """Bit-identical masters, moments of zero, and training that goes on at TP 2 x PP 2 as at one process."""
    from megatron_bit.inference.convert import to_hf

    settings = ROUND_TRIPS[kind]
    _start(tmp_path / "run", tiny_data, 2, **settings, **{"parallel.tp": 2})
    to_hf(tmp_path / "run", tmp_path / "hf")
    again = settings if kind == "softmax" else {"optim.ema_decay": settings.get("optim.ema_decay", 0)}
    checkpoint = _to_run(tmp_path / "hf", tmp_path / "again", tiny_data, **again)
    newest = complete(tmp_path / "run" / "checkpoints")[-1]
    assert tiny_runs.worst(tiny_runs.read_state(checkpoint, "param"), tiny_runs.read_state(newest, "param"))[0] == 0.0
    if kind == "chain":
        assert tiny_runs.worst(*(tiny_runs.read_state(checkpoint, state) for state in ("ema", "param")))[0] == 0.0
    losses = {}
    for name, ranks, layout in (("one", 1, {}), ("four", 4, {"parallel.tp": 2, "parallel.pp": 2})):
        shutil.copytree(tmp_path / "again", tmp_path / name)
        arguments = [f"run={tmp_path / name}", *(f"{key}={value}" for key, value in layout.items())]
        assert set(run_ranks(tiny_runs.train_file, ranks, tmp_path / name / "config.yaml", arguments)) == {0}
        losses[name] = tiny_runs.read(tmp_path / name).loss
        assert len(losses[name]) == GQA["train.steps"]
    assert losses["four"] == pytest.approx(losses["one"], abs=1e-5)


def test_raw_records_to_a_folder_and_back(tmp_path: Path) -> None:
    from mbit_data.raw import RawOptions, prepare_raw

    from megatron_bit.inference.convert import to_hf

    (tmp_path / "feed.bin").write_bytes(bytes(range(256)) * 20)
    data = prepare_raw(RawOptions((str(tmp_path / "feed.bin"),), tmp_path / "data", 16), progress=False).folder
    _start(tmp_path / "run", data, **{"model.code": "raw", "model.bits": 16})
    to_hf(tmp_path / "run", tmp_path / "hf")
    checkpoint = _to_run(tmp_path / "hf", tmp_path / "again", data)
    newest = complete(tmp_path / "run" / "checkpoints")[-1]
    assert tiny_runs.worst(tiny_runs.read_state(checkpoint, "param"), tiny_runs.read_state(newest, "param"))[0] == 0.0


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_ar_model_to_a_run_is_what_a_run_starts_with(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    _llama(tmp_path / "hf", kind)
    own = {k: v for k, v in tiny_runs.SETTINGS.items() if k.startswith("model.") and k != "model.hidden_size"}
    checkpoint = _to_run(tmp_path / "hf", tmp_path / "run", tiny_data, **{**own, "model.num_kv_heads": 2})
    settings = {"model.qk_norm": kind == "qwen3", "model.head_dim": HEAD_DIM[kind], "train.init_from": tmp_path / "hf"}
    weights = tiny_runs.read_state(checkpoint, "param")
    plain = tiny_runs.overrides(tmp_path / "start", tiny_data, {**GQA, "checkpoint.initial": True, **settings})
    assert run_ranks(tiny_runs.train_file, 1, None, plain) == [0]
    started = tiny_runs.read_state(complete(tmp_path / "start" / "checkpoints")[0], "param")
    assert tiny_runs.worst(weights, started)[0] == 0.0


def test_a_run_that_cannot_be_made(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.errors import UserError
    from megatron_bit.inference.convert import to_hf

    to_hf(trained, tmp_path / "hf", data=str(tiny_data))
    for settings, message in (
        ({"model.bits": 10}, r"model.bits is 9 there and 10 here; set model.bits=9"),
        ({"model.code": "gray"}, "model.code is binary there and gray here"),
        ({"model.rope_base": 50}, "model.rope_base is 10000.0 there and 50.0 here; set model.rope_base=10000.0"),
        ({"diffusion.parameterization": "direct"}, "set diffusion.parameterization=matched_filter"),
        ({"model.init_std": 0.3, "data.path": tmp_path}, "has no manifest.json"),  # init_std alone is no other model
        ({"data.path": ""}, "data.path is not set"),
        ({"model.hidden_size": 96, "model.head_dim": 12}, "set model.hidden_size=48 model.head_dim=12"),
    ):
        with pytest.raises(UserError, match=message):
            _to_run(tmp_path / "hf", tmp_path / "run", tiny_data, **settings)
    for source, message in ((tmp_path, "has no config.json"), (trained, "has no config.json")):
        with pytest.raises(UserError, match=message):
            _to_run(source, tmp_path / "run", tiny_data)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        _to_run(tmp_path / "hf", trained, tiny_data)
