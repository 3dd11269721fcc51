"""What reaches a fusion layer: a pass's own rows, after the row at which each sequence's earlier pass ended.

Whether they fuse is decided elsewhere; what a group goes on with is said here, by its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from quicksilver.cache import TailRow
from quicksilver.core.groups import FusionRows
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.rules import FusionWeights
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.status import Running


@dataclass(frozen=True)
class Arrivals:
    """Rows at a fusion layer, sequence after sequence: the tail, if there is one, then the pass's own rows.

    Attributes:
        rows: all of them, N.
        source: [N] row of the running state, -1 for a tail.
        tails: the tails among them, by sequence.
        bounds: row at which each sequence begins, and N at the end.
    """

    rows: FusionRows
    source: Tensor
    tails: dict[int, TailRow]
    bounds: list[int]

    def own_rows(self, seq: int) -> range:
        """Return the rows of a sequence that belong to the pass itself."""
        return range(self.bounds[seq] + (seq in self.tails), self.bounds[seq + 1])

    def is_absorbed(self, seq: int, joins: list[bool]) -> bool:
        """Whether a sequence's tail is absorbed, given which rows join the one before."""
        own = self.own_rows(seq)
        return len(own) > 0 and joins[own.start]


def gather(
    layer_idx: int, running: Running, caps: Tensor | None, weights: FusionWeights, context: PassContext
) -> Arrivals:
    """Return the rows that reach a fusion layer.

    A sequence's tail is among them where the pass brings rows that might join it, or where it must run on after
    all: a layer before this one has taken back the row that had absorbed it.
    """
    rows = _pass_rows(running, caps, weights, context)
    lengths, source = list(running.state.layout.lengths), torch.arange(len(rows), device=rows.mass.device)
    found = {seq: context.cache.tails.last(layer_idx, seq) for seq, fuses in enumerate(context.fuses) if fuses}
    tails = {seq: tail for seq, tail in found.items() if tail is not None and (lengths[seq] or not tail.ran)}
    if tails:
        own = [rows] if len(rows) else []  # where nothing runs, no layer has left an update either
        rows = FusionRows.concatenate([*(tail.row for tail in tails.values()), *own])
        source = torch.cat((source.new_full((len(tails),), -1), source))
        order = rows.seq_ids.argsort(stable=True)
        rows, source = rows.select(order), source.index_select(0, order)
    counts = (length + (seq in tails) for seq, length in enumerate(lengths))
    return Arrivals(rows, source, tails, list(accumulate(counts, initial=0)))


def _pass_rows(running: Running, caps: Tensor | None, weights: FusionWeights, context: PassContext) -> FusionRows:
    state, layout = running.state, running.state.layout
    one_each = torch.ones_like(layout.origin)
    return FusionRows(
        hidden=state.hidden,
        mean=state.hidden.float() if weights == "mass" else None,
        mass=one_each if state.mass is None else state.mass,
        members=one_each,
        positions=layout.positions,
        token_ids=context.token_ids.index_select(0, layout.origin),
        seq_ids=layout.seq_ids,
        update=running.update,
        caps=None if caps is None else caps.index_select(0, layout.origin),
    )


def group_state(rows: FusionRows, layout: RaggedLayout) -> TokenState:
    """Return the state with which representatives, each standing for its group, go on."""
    hidden = rows.hidden if rows.mean is None else rows.mean.to(rows.hidden.dtype)
    return TokenState(hidden, layout, rows.mass)
