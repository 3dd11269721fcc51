"""Rotary positions over flat rows; the frequencies come from transformers' own rotary modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of each row's position, each [N, 1, head_dim]."""

    cos: Tensor
    sin: Tensor

    def select(self, rows: Tensor) -> Rotation:
        """Return the rotation of the given rows ([M])."""
        return Rotation(self.cos.index_select(0, rows), self.sin.index_select(0, rows))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [N, heads, head_dim]; halves are paired as in transformers' Llama."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin
