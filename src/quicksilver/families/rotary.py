"""Rotary positions over flat rows; the frequencies come from transformers' own rotary modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 16  # rows up to which rotations are looked up
_FIRST = 256  # positions known to begin with


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of each row's position, each [N, 1, head_dim]."""

    cos: Tensor
    sin: Tensor

    def select(self, rows: Tensor) -> Rotation:
        """Return the rotation of the given rows ([M])."""
        return Rotation(self.cos.index_select(0, rows), self.sin.index_select(0, rows))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [N, heads, head_dim]; halves are paired as in transformers' Llama. Its dtype stays."""
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(x.dtype)


class RotationTable:
    """Rotations by position, looked up on the CPU.

    What computes them is many small operations, some on several threads, which afterwards wait awake where the compiled
    kernels' threads should run. Beyond `num_positions` frequencies may change, so none are looked ahead.
    """

    def __init__(self, compute: Callable[[Tensor], Rotation], num_positions: int) -> None:
        self._compute, self._num_positions = compute, num_positions
        self._known = Rotation(torch.empty(0), torch.empty(0))

    def __call__(self, positions: Tensor) -> Rotation:
        count = positions.shape[0]
        if not positions.is_cpu or count == 0:
            return self._compute(positions)
        last = max(positions.tolist()) if count <= _FEW else int(positions.max())
        known, needed = self._known, last + 1
        if needed > known.cos.shape[0]:
            known = self._known = self._compute(torch.arange(min(max(_FIRST, 2 * needed), self._num_positions)))
        return known.select(positions)
