"""What a converted folder holds, and what conversion and loading refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from gloo_ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from megatron_bit.errors import UserError
from megatron_bit.evaluation.loading import open_model
from megatron_bit.inference import convert
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.safetensors_stream import Spec, plan_shards
from megatron_bit.run.folder import newest_checkpoint


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_files(converted):
    whole, sharded = converted["k4"].folder, converted["odd"].folder
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {file.name for file in convert.CODE}
    assert {p.name for p in whole.iterdir()} - {"curves.svg"} == {*names, "README.md", "model.safetensors"}
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {k: f for f in files for k in load_file(sharded / f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(sharded).values())
    for file in convert.CODE:
        assert (whole / file.name).read_text() == file.read_text()
    config = json.loads((whole / "config.json").read_text())
    assert config["training_step"] == 1
    identity = json.loads((converted["k4"].run / "identity.json").read_text())
    assert config["tokenizer_sha256"] == identity["tokenizer"] == sha256(converted["k4"].data / "tokenizer.model")
    assert config["code_fingerprint"] == identity["code table"]
    assert not list(whole.parent.glob("*.partial*"))


def test_a_run_says_how_its_model_is_generated_from(converted, tmp_path):
    """In the folder and of the run itself, unless it is told otherwise."""
    told, changed = {"steps": 5, "sampler": "em", "guidance": 1.5}, tmp_path / "run"
    settings = {f"generate.{key}": value for key, value in told.items()} | {"diffusion.condition_drop": 0.2}
    made = tiny_runs.overrides(changed, converted["k4"].data, {**settings, "train.steps": 1})
    assert run_ranks(tiny_runs.train, 1, made) == [0]
    to_hf(changed, tmp_path / "folder")
    how = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert {key: how[key] for key in told} == told
    run, folder, prompt = Generator(changed), Generator(tmp_path / "folder"), [[5, 6, 7]]
    text = run.run(prompt, 24, streamer=None, seed=3)
    assert text == folder.run(prompt, 24, streamer=None, seed=3) == run.run(prompt, 24, streamer=None, seed=3, **told)
    for key, other in {"steps": 9, "sampler": "ode", "guidance": 1.0}.items():
        assert run.run(prompt, 24, streamer=None, seed=3, **{key: other}) != text, key


def test_dtypes_round_once(converted):
    full, half = tensors(converted["odd"].folder), tensors(converted["bf16"].folder)
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        assert tensor.dtype == (torch.int8 if name == "model.code_table" else torch.float32)
        assert torch.equal(half[name], tensor if name == "model.code_table" else tensor.bfloat16())


def test_every_value_of_the_checkpoint_is_there(converted):
    """Fused tensors are cut without loss: as many values, with the same sum of squares."""
    import tiny_runs

    for name in ("sharded_training", "k1", "odd"):
        masters = tiny_runs.read_state(newest_checkpoint(converted[name].run), "param")
        made = tensors(converted[name].folder)
        del made["model.code_table"]
        for a, b in ((masters, made),):
            assert sum(t.numel() for t in a.values()) == sum(t.numel() for t in b.values())
            total = [sum(float(t.double().square().sum()) for t in x.values()) for x in (a, b)]
            assert total[0] == pytest.approx(total[1], rel=1e-12)


def test_shards_hold_as_much_as_they_may():
    specs = [Spec(f"t{i}", (size,), torch.int8) for i, size in enumerate((4, 4, 4, 9, 1, 8))]
    shards = plan_shards(specs, 8)
    assert [[s.name for s in shard] for shard in shards.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["t5"]]
    assert list(plan_shards(specs, 30)) == ["model.safetensors"]


def test_one_tensor_is_in_memory_at_a_time(converted, tmp_path, monkeypatch):
    """Of the float32 tensors that the reader makes, the previous one is gone when the next is asked for."""
    import weakref

    from megatron_bit.inference import hf_names

    alive: list = []
    most = 0
    read = hf_names._read

    def watched(*arguments):
        nonlocal most
        tensor = read(*arguments)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(hf_names, "_read", watched)
    to_hf(converted["k4"].run, tmp_path / "out")
    assert len(alive) > 30 and most <= 2


@pytest.mark.parametrize("made", ["file", "folder"])
def test_what_is_there_is_left_alone(made, converted, tmp_path):
    out = tmp_path / "out"
    if made == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        to_hf(converted["odd"].run, out)
    assert (out if made == "file" else out / "mine").read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    to_hf(converted["odd"].run, empty)
    assert (empty / "model.safetensors").exists()


def _without_tensors(run: Path) -> None:
    next((newest_checkpoint(run)).glob("rank-*.safetensors")).unlink()


def _another_value(run: Path) -> None:
    """One bit of one weight, as a disk or a copy makes them: nothing but its sum tells."""
    path = next(newest_checkpoint(run).glob("rank-*.safetensors"))
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    places = json.loads(data[8 : 8 + header])
    weights = next(value for name, value in places.items() if "/param/" in name)
    data[8 + header + weights["data_offsets"][0]] ^= 1
    path.write_bytes(data)


def _of_another_code(run: Path) -> None:
    _edit_meta(run, '"code": "random"', '"code": "gray"')


def _of_another_shape(run: Path) -> None:
    _edit_meta(run, '"ffn_hidden_size": 88', '"ffn_hidden_size": 92')


def _edit_meta(run: Path, old: str, new: str) -> None:
    path = newest_checkpoint(run) / "meta.json"
    path.write_text(path.read_text().replace(old, new))
    tiny_runs.sums_anew(path.parent)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_tensors, "is damaged: .* cannot be read"),
        (_another_value, "is damaged: .* has changed since it was written.*verify"),
        (_of_another_code, "another table of codes"),
        (_of_another_shape, r"shape \(88, 48\), the configuration wants \(92, 48\)"),
        (shutil.rmtree, "no complete checkpoint"),
    ],
)
def test_a_damaged_checkpoint_leaves_nothing_behind(damage, words, converted, tmp_path):
    shutil.copytree(converted["k4"].run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        to_hf(tmp_path / "run", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {"run"}


@pytest.mark.parametrize("size", ["0", "5", "1e3", "GB", "5 PB", "-1GB"])
def test_sizes(size, converted, tmp_path):
    if size == "5":  # bytes: one tensor a file
        to_hf(converted["k4"].run, tmp_path / "out", shard_size=size)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(tensors(converted["k4"].folder))
    else:
        with pytest.raises(UserError, match="is not a size"):
            to_hf(converted["k4"].run, tmp_path / "out", shard_size=size)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _one_tensor_less(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.self_attn.k_proj.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def _another_shape(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 88', '"intermediate_size": 90'))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [_no_weights, _cut_weights, _one_tensor_less, _another_shape, _no_tokenizer, _another_model, _no_json]
)
def test_a_damaged_folder_is_refused(damage, converted, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=str(folder)):
        Generator(folder)


def test_another_tokenizer_of_the_same_size_is_refused(converted, tmp_path):
    """Two tokens have changed places: every text would be read and written otherwise, without an error."""
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"folder/tokenizer.json is not the tokenizer that .* was converted with"):
        Generator(folder)
    with pytest.raises(UserError, match="is not the tokenizer"):
        open_model(folder)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("config.json", "num_attention_heads", 4.0),
        ("config.json", "num_hidden_layers", "2"),
        ("config.json", "max_position_embeddings", 0),
        ("config.json", "head_prior", 1),
        ("config.json", "group_sizes", [1.5]),
        ("config.json", "head_kind", "/etc/hostname"),
        ("config.json", "num_key_value_heads", 2**31),
        ("config.json", "hidden_size", 2**70),
        ("config.json", "sigma_kind", "normal"),
        ("generation_config.json", "steeps", 32),
        ("generation_config.json", "num_beams", 4),
        ("generation_config.json", "steps", 1),
        ("generation_config.json", "sampler", "http://127.0.0.1:9/x"),
        ("generation_config.json", "guidance", -1.0),
    ],
)
def test_values_that_mean_nothing_are_refused_when_the_folder_is_opened(file, name, value, converted, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, name: value}))
    here = {  # what it is called in a configuration
        "max_position_embeddings": "data.seq_length", "num_key_value_heads": "model.num_kv_heads",
        "head_kind": "model.head.kind", "sigma_kind": "diffusion.noise",
    }  # fmt: skip
    with pytest.raises(UserError, match=rf"{folder}.*{here.get(name, name)}"):
        Generator(folder)


def test_sizes_that_the_weights_do_not_have_cost_no_memory(converted, tmp_path):
    """A layer of 2^40 parameters: refused by what the file's header says, before anything of that size is made."""
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "hidden_size": 2**19, "intermediate_size": 2**21}))
    with pytest.raises(UserError, match=rf"{folder}: tensor model.* is of shape .*, and config.json makes it .*524288"):
        Generator(folder)


def test_a_tokenizer_that_transformers_has_saved_is_the_same_one(converted, tmp_path):
    """It writes padding and a template anew, and what a folder of before says is nothing."""
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    again = PreTrainedTokenizerFast.from_pretrained(folder)
    again(["a", "b c d"], padding=True)
    again.save_pretrained(folder)
    assert sha256(folder / "tokenizer.json") != sha256(converted["k4"].folder / "tokenizer.json")
    text = "def f(x):\n    return  x</s>"
    assert Generator(folder).text.encode(text) == Generator(converted["k4"].folder).text.encode(text)
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer_fingerprint"], config["tokenizer_sha256"], config["code_fingerprint"]
    (folder / "config.json").write_text(json.dumps(config))
    Generator(folder)


def test_commands_say_one_line_and_exit_with_2(converted, tmp_path):
    """The whole way once: an existing output, and a folder without its weights."""
    folder = tmp_path / "folder"
    shutil.copytree(converted["k4"].folder, folder)
    _no_weights(folder)
    for words, expected in (
        (["convert", str(converted["k4"].run), "--to", "hf", str(folder)], "not an empty folder"),
        (["generate", str(folder)], "cannot be read"),
        (["generate", str(folder), "--prompt-file", str(tmp_path / "nowhere")], "--prompt-file"),
    ):
        command = [sys.executable, "-P", "-m", "megatron_bit", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
