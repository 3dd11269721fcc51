"""Ragged batches: rows of several sequences laid end to end, with no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedLayout:
    """Where each of N rows comes from. Rows of one sequence are adjacent and in order of position."""

    lengths: tuple[int, ...]  # rows of each sequence, on the host (shapes depend on them)
    seq_ids: Tensor  # [N] sequence of each row
    positions: Tensor  # [N] logical position in its sequence, never a cache slot
    origin: Tensor  # [N] row in the batch that entered the first layer

    @classmethod
    def build(cls, starts: Sequence[int], lengths: Sequence[int], device: torch.device | str) -> RaggedLayout:
        """Lay out `lengths[b]` new tokens of each sequence b, the first at position `starts[b]`."""
        total = sum(lengths)
        origin = torch.arange(total, device=device)
        if len(lengths) == 1:
            positions = torch.arange(starts[0], starts[0] + total, device=device) if starts[0] else origin
            return cls((total,), origin if total == 1 else torch.zeros_like(origin), positions, origin)
        if all(length == 1 for length in lengths):  # one token of each sequence
            return cls(tuple(lengths), origin, torch.tensor(starts, dtype=torch.int64, device=device), origin)
        counts = torch.tensor(lengths, device=device)
        seq_ids = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=total)
        offsets = [start - bound for start, bound in zip(starts, accumulate([0, *lengths[:-1]]), strict=True)]
        positions = origin + torch.tensor(offsets, device=device).index_select(0, seq_ids)
        return cls(tuple(lengths), seq_ids, positions, origin)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def select(self, rows: Tensor) -> RaggedLayout:
        """Return the layout of the given rows ([M], ascending)."""
        seq_ids = self.seq_ids.index_select(0, rows)
        if len(self.lengths) == 1:
            lengths: tuple[int, ...] = (rows.shape[0],)
        else:
            lengths = tuple(torch.bincount(seq_ids, minlength=len(self.lengths)).tolist())
        return RaggedLayout(lengths, seq_ids, self.positions.index_select(0, rows), self.origin.index_select(0, rows))
