"""Rows that reach a fusion layer, and the groups they form; deciding which rows join is a rule's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class FusionRows:
    """Rows of several sequences at a fusion layer; a row may stand for a whole group that it ends."""

    hidden: Tensor  # [N, d] the rows' own states
    mean: Tensor | None  # [N, d] float32, mean over the tokens that the row stands for, None where no mean is used
    mass: Tensor  # [N] int64, tokens that the row stands for
    positions: Tensor  # [N] logical positions; a row covers its last `mass` positions
    token_ids: Tensor  # [N] the tokens at those positions
    seq_ids: Tensor  # [N] sequences, ascending

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def select(self, rows: Tensor) -> FusionRows:
        """Return the given rows ([M])."""
        values = (getattr(self, field.name) for field in fields(self))
        return FusionRows(*(None if value is None else value.index_select(0, rows) for value in values))  # type: ignore[arg-type]

    @classmethod
    def concatenate(cls, parts: Sequence[FusionRows]) -> FusionRows:
        """Return the parts' rows, end to end."""
        columns = (
            None if values[0] is None else torch.cat(values)
            for values in zip(*([getattr(part, field.name) for field in fields(cls)] for part in parts), strict=True)
        )
        return cls(*columns)  # type: ignore[arg-type]


class Groups(NamedTuple):
    """How N rows fell into G groups of adjacent rows."""

    group_ids: Tensor  # [N] group of each row, ascending
    last: Tensor  # [G] each group's last row, its representative

    @classmethod
    def from_joins(cls, joins: Tensor) -> Groups:
        """Group rows of which `joins` ([N] bool) says who joins the row before."""
        ends = torch.cat((~joins[1:], joins.new_ones(1)))
        return cls((~joins).cumsum(0) - 1, ends.nonzero().squeeze(-1))

    def sum(self, values: Tensor) -> Tensor:
        """Return each group's sum of `values` ([N, ...]), [G, ...]."""
        sums = values.new_zeros((self.last.shape[0], *values.shape[1:]))
        return sums.index_add_(0, self.group_ids, values)


def merge(rows: FusionRows, groups: Groups) -> FusionRows:
    """Return the groups' last rows, each standing for its group: masses add up, means are averaged by them."""
    last = rows.select(groups.last)
    mass = groups.sum(rows.mass)
    mean = None
    if rows.mean is not None and last.mean is not None:
        averaged = groups.sum(rows.mean * rows.mass[:, None]) / mass[:, None]
        alone = torch.bincount(groups.group_ids, minlength=len(last))[:, None] == 1
        mean = torch.where(alone, last.mean, averaged)  # a row alone keeps its bits
    return replace(last, mean=mean, mass=mass)
