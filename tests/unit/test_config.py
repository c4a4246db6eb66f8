"""The configuration: layers, messages, round trip."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_bit.config import Config, config_from_dict, leaves, load_config, preset_names, to_yaml
from megatron_bit.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_later_layers_win(write):
    """Each key is set by all layers up to one of them."""
    assert load_config().model.num_layers == 6 and load_config() == Config()
    assert load_config(preset="laptop").model.num_layers == 4
    path = write("model: {num_layers: 3, head: {num_layers: 5}}\ntrain: {steps: 44}\n")
    config = load_config(path, preset="laptop")
    assert (config.model.num_layers, config.model.head.num_layers, config.train.steps) == (3, 5, 44)
    assert config.model.bits == 12 and config.model.head.hidden_size == 128  # from the preset: sections merge
    assert config.optim.grad_clip == 1.0  # from the defaults
    config = load_config(path, ["model.num_layers=2", "train.steps=55", "train.steps=66"], preset="laptop")
    assert (config.model.num_layers, config.model.head.num_layers, config.train.steps) == (2, 5, 66)


def test_a_file_names_a_preset_and_the_command_line_overrules_it(write):
    path = write("preset: laptop\nrun: here\n")
    assert load_config(path).model.bits == 12 and load_config(path).run == "here"
    assert load_config(path, preset="125m").model.hidden_size == 768


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_split_as_they_say(name):
    from megatron_bit.parallel.dims import ParallelDims

    config = load_config(preset=name)
    ParallelDims.build(config, config.parallel.tp * config.parallel.pp)
    assert set(preset_names()) == {"laptop", "125m", "1b", "8b", "bitlm"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("2.0E-4", 2e-4), ("1", 1.0)],
)
def test_floats_of_the_command_line(text, value):
    """YAML 1.1 reads 3e-4 as a string."""
    assert load_config(overrides=[f"optim.lr={text}"]).optim.lr == value


def test_values_of_the_command_line():
    config = load_config(overrides=["optim.betas=[0.8, 0.9]", "train.stop_at=null", "log.to=[]", "run=a=b"])
    assert config.optim.betas == (0.8, 0.9) and config.train.stop_at is None
    assert config.log.to == () and config.run == "a=b"


NO_TRUTH = "(command line): is yes or no, in YAML, and this key takes neither"
MESSAGES = {
    "model.num_layer=3": "model.num_layer (command line) is not a configuration key; did you mean model.num_layers?",
    "train.step=3": "train.step (command line) is not a configuration key; did you mean train.steps?",
    "lr=1": "lr (command line) is not a configuration key; did you mean optim.lr?",
    "model.head.hidden_sise=3": "model.head.hidden_sise (command line) is not a configuration key; did you mean "
    "model.head.hidden_size?",
    "zzzqqq=1": "zzzqqq (command line) is not a configuration key; `megatron-bit config` lists them all",
    "train.steps": "'train.steps' is not key=value; write for example train.steps=2000",
    "=3": "'=3' is not key=value; write for example train.steps=2000",
    "model=3": "model = 3 (command line) is a section; set its keys, such as model.bits=...",
    "train.steps=abc": "train.steps = 'abc' (command line): input should be a valid integer, "
    "unable to parse string as an integer",
    "train.steps=3.5": "train.steps = 3.5 (command line): input should be a valid integer, "
    "got a number with a fractional part",
    "train.steps=0": "train.steps = 0 (command line): input should be greater than or equal to 1",
    "optim.lr=.nan": "optim.lr = nan (command line): input should be a finite number",
    "optim.lr=-1": "optim.lr = -1 (command line): input should be greater than 0",
    "model.bits=257": "model.bits = 257 (command line): input should be less than or equal to 256",
    "model.bits=63": "model: bits 63 is more than the 62 of a token id; only code=raw has up to 256",
    "optim.schedule=linear": "optim.schedule = 'linear' (command line): input should be 'cosine' or 'wsd'",
    "parallel.zero_stage=4": "parallel.zero_stage = 4 (command line): input should be 'auto', 0, 1, 2 or 3",
    "data.seq_length=130": "data.seq_length 130 has to be a multiple of model.block_size 4; use 128 or 132",
    "train.micro_batch_size=5": "train.global_batch_size 16 has to be a multiple of train.micro_batch_size 5",
    "model.num_heads=7": "model: hidden_size 256 has to be a multiple of num_heads 7, or head_dim be set",
    "model.num_heads=256": "model: hidden_size / num_heads = 1 has to be even for RoPE",
    "model.head_dim=15": "model: head_dim 15 has to be even for RoPE",
    "model.num_kv_heads=3": "model: num_heads 4 has to be a multiple of num_kv_heads 3",
    "model.head.num_heads=3": "model.head: hidden_size 256 has to be a multiple of num_heads 3",
    "model.names=pairs": "model: names pairs needs several groups of several bits, and group_bits 1 makes 16 of 16 "
    "bits; leave it at sum, or at auto",
    "model.head.prior_rank=8": "model: head.prior_rank 8 needs head.kind chain with head.prior and several groups of "
    "several bits; leave it at 0, or at null",
    "model.head.token_before=true": "model: head.token_before true needs head.kind diffusion and group_bits above 1, "
    "and they are diffusion and 1; leave it at false, or at null",
    "model.head.soft_prior=true": "model: head.soft_prior true needs head.kind diffusion with head.prior and "
    "group_bits above 1, and they are diffusion, true and 1; leave it at false, or at null",
    "diffusion.levels_apart=2": "diffusion.levels_apart 2 needs model.head.kind diffusion and model.group_bits above "
    "1, and they are diffusion and 1; set it to 0",
    "generate.guidance=9": "generate.guidance 9 needs diffusion.condition_drop above 0 (0.1 is usual), and it is 0; "
    "set it to 1",
    "generate.sampler=none": "generate.sampler = 'none' (command line): input should be 'ode', 'heun', 'dpm', 'em' or "
    "'churn'",
    "diffusion.noisy_every=4": "diffusion.noisy_every 4 needs model.head.kind chain and diffusion.noise lognormal or "
    "logistic, and they are diffusion and lognormal; set it to 0",
    "diffusion.levels_apart=4": "diffusion: levels_apart 4 has to be smaller than noise_samples 4: one evaluation of a "
    "block at least has one level for all",
    "model.head.window=true": f"model.head.window = True {NO_TRUTH}",
    "optim.lr=on": f"optim.lr = True {NO_TRUTH}",
    "optim.betas=[no,0.9]": f"optim.betas = [False, 0.9] {NO_TRUTH}",
    "parallel.zero_stage=true": f"parallel.zero_stage = True {NO_TRUTH}",
    "diffusion.sigma_min=200": "diffusion: sigma_min 200.0 has to be smaller than sigma_max 160.0",
    "parallel.vpp=2": "parallel: vpp 2 needs pp > 1; use vpp=1, or pp=2 and more",
}


# what is asked for beside FOLLOW with 16 bits: pairs, prior_rank, token_before, soft_prior
OFF = {"names": "sum", "head.prior_rank": "0", "head.token_before": "false", "head.soft_prior": "false"}
FOLLOW = [f"model.{key}={'auto' if key == 'names' else 'null'}" for key in OFF]
FOLLOWING = {
    ("model.head.kind=chain", "model.group_bits=8"): (True, 256, False, False),
    ("model.head.kind=chain", "model.group_bits=8", "model.head.hidden_size=64"): (True, 64, False, False),
    ("model.head.kind=chain", "model.group_bits=8", "model.head.prior=false"): (True, 0, False, False),
    ("model.head.kind=chain", "model.group_bits=1"): (False, 0, False, False),
    ("model.head.kind=chain", "model.bits=8", "model.group_bits=8"): (False, 0, False, False),
    ("model.head.kind=diffusion", "model.group_bits=8"): (True, 0, True, True),
    ("model.head.kind=diffusion", "model.group_bits=8", "model.head.prior=false"): (True, 0, True, False),
    ("model.head.kind=diffusion", "model.bits=8", "model.group_bits=8"): (False, 0, True, True),
    ("model.head.kind=diffusion", "model.group_bits=1"): (False, 0, False, False),
    ("model.head.kind=softmax", "model.block_size=1", "model.group_bits=1"): (False, 0, False, False),
}


@pytest.mark.parametrize("given", FOLLOWING)
def test_names_and_the_prior_follow_the_head(given):
    model = load_config(overrides=[*FOLLOW, *given]).model
    assert (model.pairs, model.prior_rank, model.token_before, model.soft_prior) == FOLLOWING[given]
    told = [f"model.{key}={value}" for key, value in OFF.items()]
    for overrides in ([*told, *given], [*given]):  # the defaults are those of runs from before the keys
        model = load_config(overrides=overrides).model
        assert (model.pairs, model.prior_rank, model.token_before, model.soft_prior) == (False, 0, False, False)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("given", FOLLOWING)
def test_a_preset_goes_with_every_head(name, given):
    model, published = load_config(preset=name).model, name == "bitlm"  # which has what the paper has, and no more
    assert model.pairs is not published and model.prior_rank == (0 if published else model.head.hidden_size)
    config = load_config(preset=name, overrides=given)
    assert config.noisy_every == (8 if config.model.head.kind == "chain" and not published else 0)


NOISY = {  # beside diffusion.noisy_every=null
    ("model.head.kind=chain",): 8,
    ("model.head.kind=chain", "model.block_size=1"): 8,
    ("model.head.kind=chain", "model.block_size=1", "model.bits=8", "model.group_bits=8"): 0,
    ("model.head.kind=chain", "diffusion.noise=entropy_rate"): 0,
    ("model.head.kind=diffusion",): 0,
    ("model.head.kind=softmax", "model.block_size=1"): 0,
}


@pytest.mark.parametrize("given", NOISY)
def test_noisy_blocks_follow_the_head(given):
    config = load_config(overrides=["diffusion.noisy_every=null", *given])
    assert (config.noisy_every, config.noisy_share > 0) == (NOISY[given], NOISY[given] > 0)
    assert load_config(overrides=given).noisy_every == 0  # as of runs from before
    if NOISY[given]:
        assert load_config(overrides=["diffusion.noisy_every=3", *given]).noisy_every == 3


def test_how_a_model_is_generated_from_follows_the_head():
    drop, told = "diffusion.condition_drop=0.1", ["generate.steps=9", "generate.sampler=em", "generate.temperature=0.5"]
    kinds = {kind: f"model.head.kind={kind}" for kind in ("diffusion", "chain")}
    assert load_config(overrides=[kinds["diffusion"]]).generation == {"steps": 16, "sampler": "em"}
    assert load_config(overrides=[kinds["chain"]]).generation == {}
    assert load_config(overrides=[*told, kinds["diffusion"]]).generation == {"steps": 9, "sampler": "em"}
    guided = load_config(overrides=[*told, kinds["chain"], drop, "generate.guidance=2"])
    assert guided.generation == {"temperature": 0.5, "guidance": 2.0}
    paper = load_config(preset="bitlm")
    assert paper.generation == {"steps": 15, "sampler": "ode", "guidance": 9.0}
    assert (paper.model.bits, paper.model.block_size, paper.loss) == (18, 4, "mse")


@pytest.mark.parametrize("override", MESSAGES)
def test_message(override):
    with pytest.raises(UserError) as error:
        load_config(overrides=[override])
    assert str(error.value) == MESSAGES[override]


def test_messages_that_need_two_keys():
    with pytest.raises(
        UserError, match=r"^parallel: zero_stage 2 with pp 2 is not possible: .*; use zero_stage=1, or pp=1$"
    ):
        load_config(overrides=["parallel.zero_stage=2", "parallel.pp=2"])
    with pytest.raises(UserError, match=r"^train.steps = 'a' .* \(and 1 more\)$"):
        load_config(overrides=["train.steps=a", "train.seed=b"])
    with pytest.raises(UserError, match=r"^train.steps = {'a': 1} \(command line\): input should be a valid integer"):
        load_config(overrides=["train.steps=5", "train.steps.a=1"])
    with pytest.raises(UserError, match="preset 'nope' does not exist; choose one of 125m, 1b, 8b, bitlm, laptop"):
        load_config(preset="nope")


FILES = {
    "train: {steps: x}": r"^train\.steps = 'x' \(FILE\): input should be a valid integer",
    "train: {stepz: 1}": r"^train\.stepz \(FILE\) is not a configuration key; did you mean train\.steps\?$",
    "preset: nope": r"^preset 'nope' does not exist; choose one of ",
    "preset: [a]": r"^preset \['a'\] does not exist",
    "a: [1": r"^configuration FILE is not valid YAML: .*line 1, column 4",
    "- 1": r"^configuration FILE has to be a mapping of keys, not list$",
    b"\xff\xfe\x00": r"^configuration FILE cannot be read: ",
    "model:": r"^model = None \(FILE\) is a section; set its keys, such as model\.bits=\.\.\.$",
    "true: 3": r"^True \(FILE\) is not a configuration key",
}


@pytest.mark.parametrize("text", FILES)
def test_message_of_a_file(write, text):
    path = write(text)
    with pytest.raises(UserError, match=FILES[text].replace("FILE", re.escape(str(path)))) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_and_empty_file(write, tmp_path):
    with pytest.raises(
        UserError, match=r"none\.yaml does not exist; give a YAML file, or --preset 125m\|1b\|8b\|bitlm\|laptop"
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    assert load_config(write("")) == Config()


def test_the_origin_is_the_layer_that_won(write):
    path = write("train: {steps: x}")
    with pytest.raises(UserError, match=r"^train\.steps = 'y' \(command line\)"):
        load_config(path, ["train.steps=y"])


def test_frozen_and_closed():
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 5
    with pytest.raises(ValidationError, match="frozen"):
        config.model = config.model
    with pytest.raises(UserError):
        config_from_dict({"train": {"stepz": 3}})


def test_leaves_are_documented():
    """Names, defaults and a docstring for each: the help and docs are made from them."""
    names = dict(leaves())
    assert {"run", "model.bits", "model.head.num_heads", "train.stop_at", "log.every"} <= names.keys()
    assert not {"model", "model.head", "train"} & names.keys()
    assert [name for name, field in names.items() if not field.description] == []


finite = {"allow_nan": False, "allow_infinity": False}
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "run": st.text(st.characters(exclude_categories=["Cs"])),
        "data": st.fixed_dictionaries({"path": st.text(st.characters(exclude_categories=["Cs"]))}),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "seed": st.integers(0, 2**63 - 1),
                "stop_at": st.none() | st.integers(1, 1000),
                "precision": st.sampled_from(["fp32", "bf16"]),
            },
        ),
        "optim": st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(0, exclude_min=True, **finite),
                "betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
                "schedule": st.sampled_from(["cosine", "wsd"]),
            },
        ),
        "diffusion": st.fixed_dictionaries({"log_mean": st.floats(-2.0, 1.0)}),
        "log": st.fixed_dictionaries(
            {"to": st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), unique=True)}
        ),
        "model": st.fixed_dictionaries(
            {
                "bits": st.integers(1, 62),
                "code": st.sampled_from(["binary", "gray", "random"]),
                "qk_norm": st.booleans(),
            }
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(tree=OVERRIDES)
def test_yaml_round_trip(tmp_path_factory, tree):
    config = config_from_dict(tree)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_imports_no_torch():
    """Every command validates its configuration before anything heavy is imported."""
    code = "import sys, megatron_bit.config as c; c.load_config(preset='laptop'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "numpy", "megatron", "deepspeed", "triton", "transformers"}
    assert "megatron_bit.config" in modules and not heavy & set(modules)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("train.lr", "optim.lr"),
        ("head.num_layers", "model.head.num_layers"),
        ("every", "evaluate.every or checkpoint.every or log.every"),
        ("parallel.ttp", "parallel.tp"),
        ("hidden_size", "model.hidden_size or model.head.hidden_size"),
    ],
)
def test_suggestions_find_the_section(key, names):
    with pytest.raises(UserError) as error:
        load_config(overrides=[f"{key}=1"])
    assert all(name in str(error.value) for name in names.split(" or ")), str(error.value)


def test_no_override_is_lost():
    config = load_config(
        overrides=["model.bits=13", "model={num_layers: 3}", "model.head.num_layers=7", "model.head={}"]
    )
    assert (config.model.bits, config.model.num_layers, config.model.head.num_layers) == (13, 3, 7)
    assert load_config(overrides=["run=2024"]).run == "2024"


def test_a_key_given_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train: {steps: 5}\ntrain: {seed: 5}\n")
    with pytest.raises(UserError, match="key 'train' is given twice"):
        load_config(path)


def test_softmax_wants_blocks_of_one_token_and_the_vocabulary_of_the_data():
    with pytest.raises(UserError, match=r"^model.head.kind softmax .* model.block_size is 4; set model.block_size=1$"):
        load_config(preset="laptop", overrides=["model.head.kind=softmax"])
    config = load_config(preset="laptop", overrides=["model.head.kind=softmax", "model.block_size=1"])
    assert config.with_vocab_size(421).model.padded_vocab_size == 512
    assert config.with_vocab_size(512).model.padded_vocab_size == 512
    told = load_config(overrides=["model.vocab_size=420"])
    with pytest.raises(UserError, match=r"model.vocab_size is 420, and the data has a vocabulary of 421 tokens; leave"):
        told.with_vocab_size(421)


@pytest.mark.parametrize(
    "text",
    [
        "{a: " * 30_000 + "}" * 30_000, "[" * 100_000, "train: {steps: 2001-99-99}", "run: !!int x", "a: &x [*x",
        "x: !!python/object:os.system y", "run: " + "x" * 2**21,
    ],
)  # fmt: skip
def test_text_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"configuration .*c.yaml (is not valid YAML|has over )") as said:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(said.value) and len(str(said.value)) < 2000


def test_a_value_that_names_itself_again_and_again(tmp_path: Path) -> None:
    """A billion laughs: the message shows the beginning of it."""
    lines = ["l0: &l0 [ha, ha]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))]
    (tmp_path / "c.yaml").write_text("train: {steps: {" + ", ".join(lines) + "}}\n")
    with pytest.raises(UserError, match=r"train.steps = .*valid integer") as said:
        load_config(tmp_path / "c.yaml")
    assert len(str(said.value)) < 1000


@pytest.mark.parametrize("text", ["2001-99-99", "!!int x", "[" * 5000])
def test_a_value_that_yaml_cannot_make(text: str) -> None:
    with pytest.raises(UserError, match=r"train.steps = "):
        load_config(None, [f"train.steps={text}"])


INTEGERS = sorted(
    name for name, field in leaves() if "int" in str(field.annotation) and "tuple" not in str(field.annotation)
)


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_that_nothing_holds_is_refused(name: str) -> None:
    """What torch or a counter cannot take is found here, with its name."""
    assert len(INTEGERS) > 40
    with pytest.raises(UserError, match=rf"{name.rpartition('.')[2]}\b.* {2**70}\b"):
        load_config(overrides=[f"{name}={2**70}"])


@pytest.mark.parametrize("orders", ["[]", "[2,2]", "[0,1]", "[9]", "[2,-3]"])
def test_orders_of_a_memory(orders: str) -> None:
    with pytest.raises(UserError, match=r"orders .* the lengths 1 to 8, each once"):
        load_config(overrides=[f"model.memory.orders={orders}"])
