"""Rotations that are looked up are those that the model's own module computes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quicksilver.families.registry import adapt
from quicksilver.families.rotary import Rotation, RotationTable
from tests import tiny

ROTATED = [name for name in (*tiny.FAMILIES, *tiny.VARIANTS) if not name.startswith("gpt2")]


@pytest.mark.parametrize("name", ROTATED)
def test_positions_are_looked_up(name: str) -> None:
    config, rotations = tiny.model(name).config, adapt(tiny.model(name)).rotations
    assert len(rotations) == (len(set(config.layer_types)) if name.startswith("gemma3") else 1)
    for rotation in rotations:
        assert isinstance(rotation, RotationTable)
        whole = rotation._compute(torch.arange(tiny.MAX_POSITIONS))
        for positions in (torch.tensor([0]), torch.tensor([63]), torch.tensor([5, 6, 7, 40, 2]), torch.arange(3, 60)):
            found = rotation(positions)
            assert torch.equal(found.cos, whole.cos[positions])
            assert torch.equal(found.sin, whole.sin[positions])


def test_the_table_grows_up_to_the_model() -> None:
    asked = []

    def compute(positions: torch.Tensor) -> Rotation:
        asked.append(len(positions))
        return Rotation(positions[:, None, None].float(), -positions[:, None, None].float())

    table = RotationTable(compute, 1000)
    for position in (3, 255, 256, 400, 600, 999):
        found = table(torch.tensor([position]))
        assert (found.cos.item(), found.sin.item()) == (position, -position)
    assert asked == [256, 514, 1000]
    assert len(table(torch.arange(0)).cos) == 0
