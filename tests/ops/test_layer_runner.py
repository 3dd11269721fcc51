"""The boundary between spans of layers and the kernels: names, and lists that do not fit."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from quicksilver.core.bits import MAX_WIDTH
from quicksilver.families.spec import MapRole
from quicksilver.ops import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")

ROW, PLACE = [0, 0, 0, 1, 0, 0, 8], [0, 0, 0, 0, 0, 0, 0]


def runner() -> Any:
    kernels = native.extension()
    return kernels.LayerRunner([kernels.Layer()], 4, 4, 1, 1, 4, "silu", 32)


def test_maps_and_counts_have_names_and_places_of_their_own() -> None:
    kernels = native.extension()
    assert {role: i for i, role in enumerate(get_args(MapRole))} == kernels.MAPS
    places = dict(kernels.LAYER_COUNTS)
    first = places.pop("widths") + len(kernels.MAPS) * (MAX_WIDTH + 1)
    assert sorted(places.values()) == list(range(first, kernels.NUM_LAYER_COUNTS))


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
    counts = torch.zeros(native.extension().NUM_LAYER_COUNTS, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        runner().run(0, last, hidden.data_ptr(), num_rows, rows, [], storage, 1, counts.data_ptr(), 1, False)


@pytest.mark.parametrize("name", ["set_map", "grade_map"])
def test_maps_that_there_are_not_are_refused(name: str) -> None:
    layer = native.extension().Layer()
    with pytest.raises((ValueError, TypeError)):
        getattr(layer, name)("sideways", *([], [8], 0) if name == "grade_map" else (None, 0, 0, 8))
