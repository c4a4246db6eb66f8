"""A Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bit.errors import UserError
from megatron_bit.io.strict_json import MIB, OBJECT, load
from megatron_bit.io.text import shown

TOKENIZER_CONFIG = "tokenizer_config.json"  # stands beside tokenizer.json and names the token that ends a document
CONFIG_LIMIT = 64 * MIB
# what the families call it, if nothing says so: GPT-2/NeoX, Llama 3, Llama/T5, Gemma, BERT
USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class HuggingFaceModel:
    """Encodes text only: no template, no truncation, no padding, and a special token written in a text is text."""

    def __init__(self, path: Path, data: bytes, eos_token: str | None):
        """The token that ends a document: `eos_token`, else the one in tokenizer_config.json beside the file, else
        the only one of USUAL_EOS in the vocabulary. Raises UserError if there is none, or it is not in the vocabulary.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"tokenizer {path} needs the package tokenizers; install it: pip install tokenizers"
            ) from error
        try:
            model = tokenizers.Tokenizer.from_str(data.decode())
        except BaseException as error:  # the library raises plain Exception; a panic in it is a BaseException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = shown(error)[:200]
            raise UserError(f"tokenizer {path} is not a Hugging Face tokenizer.json ({why})") from error
        # a file may carry the settings of some training, and would cut documents silently
        model.no_truncation()
        model.no_padding()
        vocabulary = model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"tokenizer {path} has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1  # ids may have gaps
        self.eos_token = eos_token or _configured(path) or _usual(path, vocabulary)
        if self.eos_token not in vocabulary:
            raise UserError(
                f"tokenizer {path} has no token {self.eos_token!r} to end documents with; name one with --eos-token"
            )
        self.eos_id: int = vocabulary[self.eos_token]
        # Special tokens are left alone in a text, so that no text can end a document. Ours has to be one of them.
        model.add_special_tokens([tokenizers.AddedToken(self.eos_token, special=True, normalized=False)])
        model.encode_special_tokens = True
        if self.eos_id in model.encode(self.eos_token, add_special_tokens=False).ids:
            raise UserError(
                f"tokenizer {path} reads {self.eos_token!r} in a text as the end of a document; "
                "name another token with --eos-token"
            )
        self._model = model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)


def config_for(eos_token: str) -> bytes:
    """A tokenizer_config.json to stand beside a copied tokenizer.json."""
    return (json.dumps({"eos_token": eos_token}, indent=2) + "\n").encode()


def _configured(path: Path) -> str | None:
    beside = path.with_name(TOKENIZER_CONFIG)
    if not beside.exists():
        return None
    token = load(beside, OBJECT, str(beside), CONFIG_LIMIT, "fix or remove it").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"{beside} has eos_token {shown(repr(token))[:60]}, which is no text; fix or remove it")
    return token


def _usual(path: Path, vocabulary: dict[str, int]) -> str:
    found = [token for token in USUAL_EOS if token in vocabulary]
    if len(found) == 1:
        return found[0]
    what = f"several tokens may end a document ({', '.join(found)})" if found else "no token is known to end a document"
    raise UserError(f"tokenizer {path}: {what}; name it with --eos-token")
