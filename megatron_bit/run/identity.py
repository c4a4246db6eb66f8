"""What makes two models, and two runs, the same: every configuration key is of one kind, and every door asks `compare`.

The doors: a run that is continued, a checkpoint behind a URL, `train.init_from` of a run, a checkpoint, a converted
folder or a foreign Hugging Face folder, and `convert --from hf`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron_bit.config import Config, config_from_dict, leaves
from megatron_bit.errors import UserError

if TYPE_CHECKING:
    from megatron_bit.data.corpus import Corpus  # which imports numpy; a plan does without


class Kind(Enum):
    """What a configuration key is to a run that is continued, or whose weights are taken."""

    MODEL = "model"  # weights mean something else with another value
    RUN = "run"  # the run saw other samples, in another order, with other noise; its weights can be taken
    DATA = "data"  # which data: compared by its fingerprint, so that it may move
    LAYOUT = "layout"  # where and how it is computed: the same to rounding
    FREE = "free"  # holds from this start on


_KINDS: dict[Kind, str] = {
    Kind.MODEL: """
        model.bits model.code model.group_bits model.names model.block_size model.attention model.num_layers
        model.hidden_size model.num_heads model.num_kv_heads model.head_dim model.ffn_hidden_size model.qk_norm
        model.rope_base model.norm_eps model.head.kind model.head.window model.head.prior model.head.prior_rank
        model.head.token_before model.head.soft_prior model.head.num_layers model.head.hidden_size
        model.head.num_heads model.head.ffn_hidden_size
        model.memory.rows model.memory.orders model.memory.hashes
        diffusion.parameterization diffusion.levels_apart diffusion.noisy_every diffusion.self_condition
    """,
    Kind.RUN: """
        model.init_std train.seed data.seq_length data.shuffle_shards data.document_boundaries data.align_blocks
    """,
    Kind.DATA: "model.vocab_size data.path data.sources data.temperature",
    Kind.LAYOUT: """
        run parallel.tp parallel.pp parallel.vpp parallel.sequence_parallel parallel.zero_stage parallel.recompute
        parallel.timeout_minutes data.prefetch data.remote.cache data.remote.cache_gib data.remote.attempts
        data.remote.timeout_seconds data.remote.workers data.verify train.micro_batch_size train.kernels
    """,
    Kind.FREE: """
        diffusion.loss diffusion.noise_samples diffusion.sigma_min diffusion.sigma_max diffusion.noise
        diffusion.noise_warmup diffusion.log_mean diffusion.log_std diffusion.context_noise diffusion.condition_drop
        optim.lr optim.head_lr_scale optim.betas optim.eps optim.weight_decay optim.grad_clip optim.schedule
        optim.warmup_steps optim.decay_fraction optim.min_lr_ratio optim.ema_decay optim.spike_guard
        optim.max_skipped optim.on_divergence optim.max_rewinds
        data.on_error train.steps train.stop_at train.global_batch_size train.precision train.init_from
        fp8.recipe fp8.amax_history fp8.first_layers_bf16 fp8.last_layers_bf16
        evaluate.every evaluate.initial evaluate.samples evaluate.noise_samples
        generate.steps generate.sampler generate.temperature generate.guidance
        checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.background checkpoint.initial
        checkpoint.mirror log.every log.to
    """,
}
KINDS: dict[str, Kind] = {key: kind for kind, keys in _KINDS.items() for key in keys.split()}

SHOWN = "diffusion.self_condition above 0"  # an input of the head; how often training shows it is free
TOLD = "diffusion.levels_apart above 0"  # the same: which levels it is told
NOISY = "diffusion.noisy_every above 0"  # of a chain: whether it has been told of noise, however often
ABOVE_0: dict[str, tuple[str, float]] = {  # key, and a value above 0
    SHOWN: ("diffusion.self_condition", 0.5),
    TOLD: ("diffusion.levels_apart", 1),
    NOISY: ("diffusion.noisy_every", 4),
}
VOCABULARY, CODE, TOKENIZER, DATA = "vocabulary size", "code table", "tokenizer", "data"
OF_TOKENS = (VOCABULARY, CODE, TOKENIZER)  # what the tokens of a model's weights are


def meaning(config: Config) -> dict[str, Any]:
    """The keys without whose values the weights mean something else: those that have an effect, resolved.

    Two configurations whose values are equal are of one model: a width of heads that is written out or not, a
    `group_bits` that cuts into the same groups, a section of a head that is not there.
    """
    m, d, head = config.model, config.diffusion, config.model.head
    values: dict[str, Any] = {
        "model.head.kind": head.kind,
        "model.num_layers": m.num_layers,
        "model.hidden_size": m.hidden_size,
        "model.num_heads": m.num_heads,
        "model.num_kv_heads": m.num_kv_heads,
        "model.head_dim": m.attention_head_dim,
        "model.ffn_hidden_size": m.ffn_hidden_size,
        "model.qk_norm": m.qk_norm,
        "model.rope_base": m.rope_base,
        "model.norm_eps": m.norm_eps,
        "model.block_size": m.block_size,
        "model.attention": m.attention if m.block_size > 1 else "causal",
        "model.memory.rows": m.memory.rows,
    }
    if m.memory.rows:
        values |= {"model.memory.orders": list(m.memory.orders), "model.memory.hashes": m.memory.hashes}
    if head.kind == "softmax":
        return values
    values |= {
        "model.bits": m.bits,
        "model.code": m.code,
        "model.group_bits": m.group_sizes[0],  # makes the same groups
        "model.names": "pairs" if m.pairs else "sum",
        "model.head.prior": head.prior,
        "model.head.num_layers": head.num_layers,
        "model.head.hidden_size": head.hidden_size,
        "model.head.num_heads": head.num_heads,
        "model.head.ffn_hidden_size": head.ffn_hidden_size,
    }
    if head.kind == "chain":
        of_chain = {"model.head.window": head.window, "model.head.prior_rank": m.prior_rank}
        return {**values, **of_chain, NOISY: config.noisy_every > 0}
    sees = {"model.head.token_before": m.token_before, "model.head.soft_prior": m.soft_prior}
    shown = {SHOWN: d.self_condition > 0, TOLD: d.levels_apart > 0}
    return {**values, **sees, "diffusion.parameterization": d.parameterization, **shown}


def identity(config: Config, corpus: Corpus, code: str) -> dict[str, Any]:
    """What every start of a run has to share: JSON values by name. `code` is the fingerprint of the table of codes."""
    manifest = corpus.manifest
    return {
        **meaning(config),
        **_of_run(config),
        VOCABULARY: manifest.vocab_size,
        CODE: code,
        DATA: corpus.fingerprint,
        TOKENIZER: manifest.tokenizer_sha256,
    }


def of_checkpoint(meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The identity of a checkpoint, of which its configuration says the most: also of one from before a key, which
    then has its default. UserError, beginning with `where`, for a meta.json that is damaged."""
    stored, config = meta.get("identity"), meta.get("config")
    if not isinstance(stored, dict) or not isinstance(config, dict):
        raise UserError(f"{where} has a meta.json without identity or configuration; take another checkpoint")
    try:
        known = config_from_dict(config)
    except UserError as error:
        raise UserError(f"{where} has a configuration that cannot be read: {error}") from None
    return {**meaning(known), **_of_run(known), **{key: stored.get(key) for key in (*OF_TOKENS, DATA)}}


def of_folder(stored: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What RUN/identity.json says; a key that is younger than the run has its default.

    One of before 2026-11-28 holds all keys of `model`, whatever their effect, and not how a head is parameterized:
    that is taken to be as in `mine`, and the checkpoint, which has a whole configuration, is asked next.
    """
    old = stored.get("model")
    if old is None:
        return {**dict.fromkeys(ABOVE_0, False), **{key: field.default for key, field in leaves()}, **stored}
    try:
        config = config_from_dict({"model": old, "diffusion": {"self_condition": 0.5 if stored.get(SHOWN) else 0.0}})
    except UserError as error:
        raise UserError(
            f"{where} has an identity that cannot be read: {error}; choose another run=... folder"
        ) from None
    known = {**meaning(config), "model.init_std": config.model.init_std}
    if "diffusion.parameterization" in known:
        known["diffusion.parameterization"] = mine.get("diffusion.parameterization")
    younger = {"data.document_boundaries": "ignore", "data.align_blocks": False}
    return {**younger, **{key: value for key, value in stored.items() if key != "model"}, **known}


def compare_run(there: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """UserError with the first key of `mine` that is another one `there`, which is said to be at `where`."""
    for key in _different(there, mine):
        raise UserError(
            f"{where} is of another run: {key} is {_short(there.get(key))} there and {_short(mine[key])} here; "
            "choose another run=... folder, or set it back"
        )


def compare_model(there: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """UserError if the weights at `where` mean something else: the first key that differs, and what to set.

    Args:
        there: what is known of the weights; of a folder of another project the layers alone.
        mine: identity of the run that would take them.
    """
    different = list(_different(mine, there))
    if not different:
        return
    first = different[0]
    if {"model.hidden_size", "model.num_heads"} & {*different} and "model.head_dim" in there:
        different.append("model.head_dim")  # which may follow from those two
    pairs = [_setting(key, there[key]) for key in dict.fromkeys(different) if key not in OF_TOKENS]
    advice = f"set {' '.join(pairs)}" if pairs else "give the data (data.path) that they were trained on"
    raise UserError(
        f"{where} is of another model: {first} is {_short(there[first])} there and {_short(mine.get(first))} here; "
        f"{advice}"
    )


def model_of(there: Mapping[str, Any]) -> dict[str, Any]:
    """Of an identity, what it says of the model: without the run that trained it."""
    return {key: value for key, value in there.items() if key in ABOVE_0 or key in OF_TOKENS or _is_model(key)}


def _of_run(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    found = {}
    for key in (key for key, kind in KINDS.items() if kind is Kind.RUN):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def _is_model(key: str) -> bool:
    return KINDS.get(key) is Kind.MODEL


def _different(there: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterable[str]:
    return (key for key, value in mine.items() if there.get(key) != value)


def _setting(key: str, value: Any) -> str:
    if key in ABOVE_0:
        name, above = ABOVE_0[key]
        return f"{name}={above if value else 0}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={text.replace(' ', '')}"  # a list without spaces is one word to a shell


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:12]}..."  # a hash is shown whole
