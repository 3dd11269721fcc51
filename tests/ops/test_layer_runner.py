"""The boundary between spans of layers and the kernels: names, and lists that do not fit."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from quicksilver.core.trace import COUNT
from quicksilver.families.spec import MapRole
from quicksilver.ops import native
from tests.ops.any_precision import module

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

ROW, PLACE = [0, 0, 0, 1, 0, 0, 8], [0, 0, 0, 0, 0, 0, 0]


def runner() -> Any:
    kernels = native.extension()
    return kernels.LayerRunner([kernels.Layer()], 4, 4, 1, 1, 4, "silu", 32)


def test_every_count_of_the_kernels_has_a_place_in_a_trace() -> None:
    counts = native.extension().COUNTS
    assert len(set(counts)) == len(counts)
    assert set(counts) < set(COUNT)


@pytest.mark.parametrize("role", get_args(MapRole))
def test_maps_are_known_by_their_roles(role: str) -> None:
    with pytest.raises(ValueError, match="the map has no matrix"):
        native.extension().Layer().grade_map(role, [], [8], 0)


@pytest.mark.parametrize(
    ("message", "last", "num_rows", "rows", "storage"),
    [
        ("2 rows of 7 fields are needed, got 7", 1, 2, ROW, PLACE),
        ("1 rows of 7 fields are needed, got 8", 1, 1, [*ROW, 0], PLACE),
        ("1 rows of 7 fields are needed, got 6", 1, 1, ROW[:-1], PLACE),
        ("1 places of 7 fields are needed, got 13", 1, 1, ROW, [*PLACE, *PLACE[1:]]),
        ("1 places of 7 fields are needed, got 14", 1, 1, ROW, PLACE * 2),
        ("a sequence that there is not", 1, 1, [1, *ROW[1:]], PLACE),
        ("no such layers", 2, 1, ROW, PLACE * 2),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    message: str, last: int, num_rows: int, rows: list[int], storage: list[int]
) -> None:
    hidden = torch.zeros(num_rows, 4)
    counts, places = torch.zeros((2, len(COUNT)), dtype=torch.int64), list(range(len(native.extension().COUNTS)))
    given = 0, last, hidden.data_ptr(), num_rows, rows, [], storage, 1, counts.data_ptr(), counts.stride(0)
    with pytest.raises(ValueError, match=message):
        runner().run(*given, places, 1, False)


def test_counts_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="each count needs a place"):
        runner().run(0, 1, 0, 0, [], [], [], 0, 0, 0, [0], 1, False)


def test_maps_that_there_are_not_are_refused() -> None:
    layer, matrix = native.extension().Layer(), module(32, 64).matrix
    for name, arguments in {"set_map": (matrix, 0, 0, 8, [0] * 9), "grade_map": ([], [8], 0)}.items():
        with pytest.raises(ValueError, match="no such map: sideways"):
            getattr(layer, name)("sideways", *arguments)
    with pytest.raises(ValueError, match="bytes of 0 to 8 bits"):
        layer.set_map("query", matrix, 0, 0, 8, [0] * 8)
    with pytest.raises(ValueError, match="one threshold fewer than bits"):
        layer.grade_map("query", [1.0], [8], 0)


def test_maps_that_are_not_the_parts_of_a_matrix_are_not_joined() -> None:
    layer, part, whole = native.extension().Layer(), module(32, 64).matrix, module(32, 200).matrix
    for role in ("query", "key", "value"):
        layer.set_map(role, part, 0, 0, 8, [0] * 9)
    with pytest.raises(ValueError, match="not the matrix's parts"):
        layer.join_maps(True, whole)
