"""Boxes of logical tensors: how flat ranges are cut into them, and how a reader puts them together again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_bit.checkpoint.index import Reader, Rectangle, flat_rectangles
from megatron_bit.errors import UserError

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """(shape, start, stop) with 0 <= start < stop <= elements."""
    shape = draw(SHAPES)
    total = Rectangle((0,) * len(shape), shape).numel
    start = draw(st.integers(0, total - 1))
    return shape, start, draw(st.integers(start + 1, total))


@st.composite
def boxes(draw: st.DrawFn, dimensions: int) -> Rectangle:
    return Rectangle(
        tuple(draw(st.integers(0, 6)) for _ in range(dimensions)),
        tuple(draw(st.integers(1, 6)) for _ in range(dimensions)),
    )


def _cells(box: Rectangle) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))


@given(ranges())
def test_flat_rectangles_cover_the_range_once_and_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(Rectangle((0,) * len(shape), shape).numel).view(shape)
    seen: list[int] = []
    for first, box in flat_rectangles(start, stop, shape):
        values = numbers[box.slices((0,) * len(shape))]
        assert values.shape == box.shape
        assert values.flatten()[0] == first == start + len(seen)
        seen += values.flatten().tolist()
    assert seen == list(range(start, stop))


@given(ranges())
def test_a_range_of_a_matrix_is_at_most_three_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    assert len(list(flat_rectangles(start, stop, shape))) <= (1 if len(shape) == 1 else 3)


def test_an_empty_range_of_a_matrix_is_no_box() -> None:
    assert list(flat_rectangles(4, 4, (3, 4))) == []


@given(st.integers(1, 2).flatmap(lambda n: st.tuples(boxes(n), boxes(n))))
def test_intersect_is_what_both_hold(pair: tuple[Rectangle, Rectangle]) -> None:
    a, b = pair
    common = a.intersect(b)
    assert common == b.intersect(a)
    assert (set() if common is None else _cells(common)) == _cells(a) & _cells(b)
    assert a.intersect(a) == a


def test_boxes_of_other_dimensions_do_not_mix() -> None:
    with pytest.raises(ValueError):
        Rectangle((0,), (2,)).intersect(Rectangle((0, 0), (2, 2)))


def _checkpoint(folder: Path, shape: tuple[int, ...], cuts: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """A tensor written as flat ranges between `cuts`, each in a file of its own, and its index."""
    whole = torch.randn(shape)
    places = []
    for rank, (start, stop) in enumerate(itertools.pairwise([0, *cuts, whole.numel()])):
        tensors = {}
        for first, box in flat_rectangles(start, stop, shape):
            key = f"w/param/{first}"
            tensors[key] = whole[box.slices((0,) * len(shape))].clone()
            file = f"rank-{rank:05d}.safetensors"
            places.append({"file": file, "key": key, "offset": list(box.offset), "shape": list(box.shape)})
        save_file(tensors, str(folder / f"rank-{rank:05d}.safetensors"))
    return whole, {"w": {"shape": list(shape), "states": {"param": places}}}


@pytest.mark.parametrize(("shape", "cuts"), [((17,), [5, 6]), ((5, 7), [3, 20, 28]), ((6, 4), [8])])
def test_any_box_is_read_from_any_pieces(shape: tuple[int, ...], cuts: list[int], tmp_path: Path) -> None:
    whole, index = _checkpoint(tmp_path, shape, cuts)
    reader = Reader(tmp_path, index)
    assert reader.shape("w") == shape
    starts = itertools.product(*(range(n) for n in shape))
    for offset in starts:
        for size in itertools.product(*(range(1, n - o + 1) for n, o in zip(shape, offset, strict=True))):
            box = Rectangle(offset, size)
            assert torch.equal(reader.read("w", "param", box), whole[box.slices((0,) * len(shape))])


WHOLE = Rectangle((0, 0), (5, 7))


@pytest.fixture
def pieces(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path, _checkpoint(tmp_path, (5, 7), [3, 20, 28])[1]


def test_a_wrong_name(pieces: tuple[Path, dict[str, Any]]) -> None:
    reader = Reader(*pieces)
    with pytest.raises(UserError, match="has no tensor v; it is of another model"):
        reader.read("v", "param", WHOLE)
    with pytest.raises(UserError, match="has no tensor v"):
        reader.shape("v")


def test_a_missing_piece(pieces: tuple[Path, dict[str, Any]]) -> None:
    folder, index = pieces
    index["w"]["states"]["param"].pop(1)
    with pytest.raises(UserError, match=r"holds \d+ of the 35 values of w \(param\).*incomplete"):
        Reader(folder, index).read("w", "param", WHOLE)


def test_a_box_beyond_the_tensor(pieces: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="holds 35 of the 42 values"):
        Reader(*pieces).read("w", "param", Rectangle((0, 0), (6, 7)))


def test_a_piece_that_is_there_twice(pieces: tuple[Path, dict[str, Any]]) -> None:
    folder, index = pieces
    places = index["w"]["states"]["param"]
    places.append(places[0])
    with pytest.raises(UserError, match="of the 35 values"):
        Reader(folder, index).read("w", "param", WHOLE)


def test_a_missing_file(pieces: tuple[Path, dict[str, Any]]) -> None:
    folder, index = pieces
    (folder / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank-00001.safetensors cannot be read"):
        Reader(folder, index).read("w", "param", WHOLE)


def test_a_cut_file(pieces: tuple[Path, dict[str, Any]]) -> None:
    folder, index = pieces
    path = folder / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"rank-00001.safetensors cannot be read"):
        Reader(folder, index).read("w", "param", WHOLE)


def test_a_file_of_something_else(pieces: tuple[Path, dict[str, Any]]) -> None:
    folder, index = pieces
    save_file({"other": torch.zeros(3)}, str(folder / "rank-00001.safetensors"))
    with pytest.raises(UserError, match=r"rank-00001.safetensors"):
        Reader(folder, index).read("w", "param", WHOLE)


def test_a_state_that_was_not_saved(pieces: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="exp_avg"):
        Reader(*pieces).read("w", "exp_avg", WHOLE)
