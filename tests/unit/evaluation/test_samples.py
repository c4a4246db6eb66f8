"""Statistics of texts against values worked out by hand, and real text beside generated."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from known import Known

from megatron_bit.errors import UserError
from megatron_bit.evaluation import mauve_score
from megatron_bit.evaluation.samples import distinct, entropy, measure, ratio, statistics
from megatron_bit.evaluation.validation import Validation


def test_entropy_and_distinct_by_hand() -> None:
    assert entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert entropy([5, 5, 5]) == 0.0
    assert entropy([1, 1, 1, 2]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(rows, 1) == pytest.approx(3 / 7)
    assert distinct(rows, 2) == pytest.approx(3 / 5)  # 12 21 12 | 12 23
    assert distinct(rows, 3) == pytest.approx(1.0)  # 121 212 | 123
    assert distinct([[1], []], 2) == 0.0


def test_ratio_by_hand() -> None:
    mean, error = ratio([2.0, 6.0], [1, 3])
    assert (mean, error) == (2.0, 0.0)  # the same nats a token: more text changes nothing
    mean, error = ratio([1.0, 5.0], [2, 2])
    assert mean == 1.5 and error == pytest.approx(math.sqrt(2 * 8) / 4)


def test_statistics_of_texts_behind_contexts() -> None:
    scorer = Known({"a": 0.5, "b": 2.5, "é": 9.0})
    found = statistics("x", scorer, ["bb", ""], ["aab", "é"], seed=0, batch_size=2)
    assert found.tokens == found.bytes == 5  # contexts are not scored, and é is two bytes
    assert found.nats_per_token == found.nats_per_byte == pytest.approx((0.5 + 0.5 + 2.5 + 1 + 1) / 5)
    assert found.perplexity == pytest.approx(math.exp(1.1))
    assert found.unigram_entropy == pytest.approx((entropy([1, 1, 2]) + entropy([1, 2])) / 2)
    assert found.distinct == pytest.approx((4 / 5, 1.0, 1.0))
    with pytest.raises(UserError, match="all 2 are empty"):
        statistics("the generated", scorer, ["a", ""], ["", ""], seed=0, batch_size=2)


@pytest.mark.parametrize("prefix", [0, 7])
def test_generated_beside_real(prefix: int, tiny_data: Path) -> None:
    model, scorer = Known({}), Known({}, otherwise=0.25)
    validation = Validation(model, tiny_data)
    how = {"texts": 6, "tokens": 20, "prefix": prefix, "how": {}, "featurizer": None, "seed": 1}
    found, other = (measure(model, scorer, validation, batch_size=size, **how) for size in (2, 6))
    assert found == other
    assert found.generated.tokens == 120 and 100 < found.real.bytes <= 130
    assert found.generated.nats_per_token == found.real.nats_per_token == 0.25
    assert found.generated.unigram_entropy == pytest.approx(math.log(20))  # 20 letters in a row, each once
    assert found.generated.distinct[0] == pytest.approx(25 / 120)
    assert found.real.unigram_entropy < math.log(20)
    assert found.mauve is None and found.mauve_not_computed == "no model for its features is given (--mauve-model)"
    assert found.first.endswith("bcdefghijklmnopqrstu") and len(found.first) == prefix + 20


def test_real_text_begins_where_documents_do(tiny_data: Path) -> None:
    model = Known({})
    validation = Validation(model, tiny_data)
    stream = np.concatenate(list(validation._shards()))
    begins = [0, *(np.flatnonzero(stream == 0) + 1)]
    pieces = validation.spread_in_documents(5, 50)
    assert pieces[0] == stream[:50].tolist() and all(0 not in piece for piece in pieces)
    may_be = [stream[at : at + 50].tolist() for begin in begins for at in range(begin, len(stream), 50)]
    assert all(piece in may_be for piece in pieces)
    with pytest.raises(UserError, match=r"pieces of 1000000 tokens, and --texts is 3"):
        validation.spread(3, 1_000_000)


def test_mauve_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)  # importing it fails
    reason = mauve_score.why_not(Path("x"))
    assert reason is not None and "is not installed (pip install mauve-text)" in reason
    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace())
    assert mauve_score.why_not(Path("x")) is None
    with pytest.raises(UserError, match="--mauve-model x cannot be read"):
        mauve_score.compute(["a"], ["b"], Path("x"), seed=0)
