"""A SentencePiece model as the `tokenizers` library's tokenizer.json, with the same ids for a text.

SentencePiece writes a space as U+2581. Here the pieces are written with the space itself, so that no normaliser is
needed and U+2581 in a text becomes its bytes, as in `megatron_bit.data.tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_bit.checkpoint.hf_config import read_json
from megatron_bit.data.tokenizer import PROBE, SPACE_MARK, Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.io.text import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of sentencepiece_model.proto
UNIGRAM, BPE = 1, 2
_CHECKS = (
    "", " ", "  ", "\n", "a", " a", "a ", "\t\tx", "a  b   c    d     e", "\r\n\r\n", "x" * 70, " " * 70, "=" * 70,
    "\u00e9\u0301 \U0001f600\U0001f468\u200d\U0001f469 \u4e2d\u6587 \u0645\u0631\u062d \ufb01 \u00a0\u3000|",
    "12345 3.14e-10 0x1F", PROBE,
)  # fmt: skip


def convert_tokenizer(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` that encodes as `tokenizer` does; checked on 1,000 texts before it is returned.

    A tokenizer that already is a tokenizer.json stays as it is, less what would be added to a text.

    Raises:
        UserError: a kind of SentencePiece model that has no such form, or a text that comes out differently.
    """
    if tokenizer.kind == "huggingface":
        return _plain(tokenizer)
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, models

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.path.read_bytes())
    _refuse(tokenizer, proto)
    texts = [p.piece.replace(SPACE_MARK, " ") if p.type in (NORMAL, USER_DEFINED) else p.piece for p in proto.pieces]
    unknown = next((p.piece for p in proto.pieces if p.type == UNKNOWN), None)
    fallback = any(p.type == BYTE for p in proto.pieces)
    if proto.trainer_spec.model_type == BPE:
        merges = _merges(tokenizer, texts, proto.pieces)
        vocabulary = {text: i for i, text in enumerate(texts)}
        model: Any = models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback
        )
    else:
        normal = [p.score for p in proto.pieces if p.type == NORMAL]
        # the library looks for every piece in the text: names of control and byte pieces must not pay
        never = 20.0 * (min(normal, default=0.0) - 10.0)
        scores = [p.score if p.type in (NORMAL, USER_DEFINED) else never for p in proto.pieces]
        at = next((i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN), None)
        model = models.Unigram(list(zip(texts, scores, strict=True)), unk_id=at, byte_fallback=fallback)
    out = tokenizers.Tokenizer(model)
    normalizer = _normalizer(proto.normalizer_spec, fallback)
    if normalizer is not None:
        out.normalizer = normalizer
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    out.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    out.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    own = [t for t, p in zip(texts, proto.pieces, strict=True) if p.type == USER_DEFINED]
    out.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in own])
    out.encode_special_tokens = True  # `</s>` in a text is six characters, as in training
    _check(tokenizer, out, _samples(texts, proto), proto.trainer_spec.model_type == UNIGRAM)
    return out


def fingerprint(folder: Path) -> str:
    """SHA-256 of what decides ids and text in a folder's tokenizer.json; `convert` writes it into config.json.

    Not of the file: transformers writes limits, padding and a template anew when it saves a tokenizer that it has used.
    UserError if there is no such file.
    """
    content = read_json(folder / "tokenizer.json")
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
    return hashlib.sha256(json.dumps([content.get(part) for part in parts], sort_keys=True).encode()).hexdigest()


def check_folder(folder: Path) -> None:
    """UserError if the tokenizer of a converted folder is another one than `convert` has written.

    Other folders do not say which one is theirs, and pass.
    """
    wanted = read_json(folder / "config.json").get("tokenizer_fingerprint")
    if wanted is None or fingerprint(folder) == wanted:
        return
    raise UserError(
        f"{folder / 'tokenizer.json'} is not the tokenizer that {folder} was converted with (config.json has "
        f"tokenizer_fingerprint {shown(wanted)[:12]}...); copy it back, or convert again"
    )


def _plain(tokenizer: Tokenizer) -> Any:
    """A tokenizer.json that was trained with, without what others would add to a text: templates, limits, padding."""
    import tokenizers

    content = read_json(tokenizer.path)
    content |= {"post_processor": None, "truncation": None, "padding": None}
    out = tokenizers.Tokenizer.from_str(json.dumps(content))
    eos = str(out.id_to_token(tokenizer.eos_id))
    out.add_special_tokens([tokenizers.AddedToken(eos, special=True, normalized=False)])
    out.encode_special_tokens = True
    _check(tokenizer, out, [*_CHECKS, eos], ties=False)
    return out


def _refuse(tokenizer: Tokenizer, proto: Any) -> None:
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    reasons = {
        "model type other than bpe and unigram": trainer.model_type not in (UNIGRAM, BPE),
        "pieces marked unused": any(p.type == UNUSED for p in proto.pieces),
        "white space as suffix": trainer.treat_whitespace_as_suffix,
        "spaces that are not escaped": not spec.escape_whitespaces,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"tokenizer {tokenizer.path} cannot be written as tokenizer.json: it has {reason}")


def _normalizer(spec: Any, fallback: bool) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if not fallback:
        steps.append(normalizers.Replace(SPACE_MARK, " "))  # without byte pieces nothing else is left to it
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None


def _merges(tokenizer: Tokenizer, texts: list[str], pieces: Any) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose *union* has the best score; here every pair has a rank of its own."""
    ranked = sorted((i for i, p in enumerate(pieces) if p.type == NORMAL), key=lambda i: -pieces[i].score)
    known = {texts[i] for i in ranked}
    merges: list[tuple[str, str]] = []
    for text in (texts[i] for i in ranked):
        if len(text) > 1 and not known.issuperset(text):
            raise UserError(
                f"tokenizer {tokenizer.path} cannot be written as tokenizer.json: piece {text!r} has a character that "
                "is no piece itself"
            )
        merges += [(text[:cut], text[cut:]) for cut in _cuts(text, known)]
    return merges


def _cuts(text: str, known: set[str]) -> list[int]:
    """Where a piece can be cut in two pieces, in the order in which the pairs have to be tried.

    SentencePiece takes the leftmost of several pairs with the same union. Two of them overlap in a text only as
    X Y Z with XY = YZ = piece: then (X, Y) has to come first. If X and Y are repetitions of the same string, either
    may stand in front; runs are longest on the left, so the longer left part comes first.
    """
    n = len(text)
    cuts = [i for i in range(n - 1, 0, -1) if text[:i] in known and text[i:] in known]
    for i in (i for i in cuts if 2 * i < n and n - i in cuts):
        if text[i:] == text[: n - i] and text[n - i :] != text[:i]:
            a, b = cuts.index(i), cuts.index(n - i)
            cuts[a], cuts[b] = cuts[b], cuts[a]
    return cuts


def _check(tokenizer: Tokenizer, out: Any, texts: Iterable[str], ties: bool) -> None:
    """`ties`: a unigram model likes two orders of the same pieces equally, as in a run of one character.

    SentencePiece adds scores in float32, tokenizers in float64, and rounding decides.
    """
    for text in texts:
        mine, theirs = tokenizer.encode(text), out.encode(text, add_special_tokens=False).ids
        if mine != theirs and not (ties and sorted(mine) == sorted(theirs)):
            raise UserError(
                f"tokenizer {tokenizer.path} cannot be written as tokenizer.json: {text!r} is {mine} in "
                f"training and {theirs} there"
            )


def _samples(texts: list[str], proto: Any) -> Iterator[str]:
    marked = [text for text in _CHECKS if SPACE_MARK not in text or not proto.normalizer_spec.add_dummy_prefix]
    yield from marked
    yield " ".join(p.piece for p in proto.pieces if p.type not in (NORMAL, USER_DEFINED))
    plain = [t for t, p in zip(texts, proto.pieces, strict=True) if p.type in (NORMAL, USER_DEFINED)]
    generator = random.Random(0)
    for _ in range(1000):
        yield "".join(generator.choices(plain, k=20))
