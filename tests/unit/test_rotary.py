"""Rotations that are looked up are those that the model's own module computes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quicksilver.families.registry import adapt
from quicksilver.families.rotary import Rotation, RotationTable
from tests import tiny


@pytest.mark.parametrize("name", tiny.ROTATED)
def test_positions_are_looked_up(name: str) -> None:
    rotations = adapt(tiny.model(name)).rotations
    frequencies = [buffer for buffer, _ in tiny.model(name).model.rotary_emb.named_buffers()]
    assert len(rotations) == sum("original" not in buffer for buffer in frequencies)
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
