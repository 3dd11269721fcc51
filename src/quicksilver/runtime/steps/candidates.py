"""What may fuse after a layer: a pass's own rows, behind the row at which each sequence's earlier pass ended."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quicksilver.backends.state import PassContext, State
from quicksilver.cache import OpenGroup
from quicksilver.core.groups import FusionRows
from quicksilver.rules import FusionWeights


@dataclass(frozen=True)
class FusionCandidates:
    """Rows at a fusion layer, sequence after sequence: its open group, if it has one, then the pass's own rows."""

    rows: FusionRows  # all of them, N
    source: Tensor  # [N] row of the running state, -1 for an open group
    open_groups: dict[int, OpenGroup]  # the open groups among them, by sequence
    bounds: list[int]  # row at which each sequence begins, and N at the end

    @classmethod
    def of_pass(cls, state: State, weights: FusionWeights, context: PassContext) -> FusionCandidates:
        """Return a pass's own rows."""
        layout, mass = state.layout, state.mass
        rows = FusionRows(
            hidden=state.hidden,
            mean=state.hidden.float() if weights == "mass" else None,
            mass=torch.ones_like(layout.origin) if mass is None else mass,
            positions=layout.positions,
            token_ids=context.token_ids.index_select(0, layout.origin),
            seq_ids=layout.seq_ids,
        )
        source = torch.arange(len(rows), device=layout.origin.device)
        return cls(rows, source, {}, list(accumulate(layout.lengths, initial=0)))

    def with_open_groups(self, layer_idx: int, context: PassContext) -> FusionCandidates:
        """Return the rows behind the open groups of this layer that they might join."""
        found: dict[int, OpenGroup] = {}
        for seq, (cache, fuses) in enumerate(zip(context.caches, context.fuses, strict=True)):
            group, comes = cache.open_group, self.bounds[seq] < self.bounds[seq + 1]
            if group is None or group.layer_idx != layer_idx or not (fuses and comes):
                continue
            if (group.mean is None) == (self.rows.mean is None):  # else a plan with other weights has left it
                found[seq] = group
        if not found:
            return self
        rows = FusionRows.concatenate([*(_as_row(group, seq, self.source) for seq, group in found.items()), self.rows])
        source = torch.cat((self.source.new_full((len(found),), -1), self.source))
        order = rows.seq_ids.argsort(stable=True)
        bounds = list(accumulate((seq in found for seq in range(len(self.bounds) - 1)), initial=0))
        bounds = [bound + more for bound, more in zip(self.bounds, bounds, strict=True)]
        return FusionCandidates(rows.select(order), source.index_select(0, order), found, bounds)

    def own_rows(self, seq: int) -> range:
        """Return the rows of a sequence that belong to the pass itself."""
        return range(self.bounds[seq] + (seq in self.open_groups), self.bounds[seq + 1])


def _as_row(group: OpenGroup, seq: int, like: Tensor) -> FusionRows:
    mass, position, token_id, seq_id = like.new_tensor([group.mass, group.position, group.token_id, seq])[:, None]
    return FusionRows(group.hidden, group.mean, mass, position, token_id, seq_id)
