"""Fusion between two layers: ask the policy which neighbours are alike, chain them, keep the last of each group.

The rules are in `quicksilver.rules.fusion`, and in packages that bring others.
A group may have begun in an earlier pass: its last row waits in the
cache (`FusionTails`) and takes part again; where it is absorbed, its entries in deeper layers are taken back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.cache import TailRow
from quicksilver.core.decisions import PairView
from quicksilver.core.groups import FusionRows, Groups, merge
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.families.spec import Adapter
from quicksilver.rules import FusionConfig
from quicksilver.rules.fusion.chain import chain
from quicksilver.runtime.arrivals import Arrivals, gather, group_state
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.protection import Protection
from quicksilver.runtime.status import Running, SplitRows, TokenStatus


class Rerun(NamedTuple):
    """Tokens of earlier passes that must run the deeper layers after all: who had absorbed them is gone."""

    state: TokenState
    token_ids: Tensor
    update: Tensor | None
    caps: Tensor | None


class Fused(NamedTuple):
    """What fusion after a layer leaves: who runs on, how all stand, and who must run before them."""

    running: Running
    status: TokenStatus
    rerun: Rerun | None


@dataclass(frozen=True)
class _Joined:
    """Arrivals and the groups that they form: `joins` [N] on the device and on the host, `merged` [G]."""

    arrivals: Arrivals
    joins: Tensor
    host_joins: list[bool]
    groups: Groups
    merged: FusionRows


class FusionStep:
    """A fusion configuration bound to a model.

    Args:
        adapter: the model.
        config: which tokens fuse; None for none.
        special_ids: token ids that are protected where the configuration says so.
    """

    def __init__(self, adapter: Adapter, config: FusionConfig | None, special_ids: Sequence[int]) -> None:
        self._config = config
        self._protection = Protection(config, special_ids, adapter.spec.device)
        self.layers: tuple[int, ...] = () if config is None else config.after_layers(adapter.spec.num_layers)

    def takes_part(self, prompt: Sequence[bool]) -> tuple[bool, ...]:
        """Return for each sequence whether its tokens may fuse, given whether they belong to a prompt."""
        scope = None if self._config is None else self._config.scope
        return tuple(scope == "all" or (scope == "prompt" and of_prompt) for of_prompt in prompt)

    def apply(self, layer_idx: int, running: Running, status: TokenStatus, context: PassContext) -> Fused | None:
        """Fuse what is alike after a layer; return None where nothing changes."""
        config = self._config
        if config is None or not any(context.fuses):
            return None
        arrivals = gather(layer_idx, running, status.caps, config.weights, context)
        if len(arrivals.rows) == 0:
            return None
        joined = self._join(layer_idx, arrivals, config, context)
        rerun = self._rerun(layer_idx, joined, context)
        stop, keep = _split(joined)
        context.trace.at(layer_idx).fusion_rows += len(running)
        origins = running.state.layout.origin.index_select(0, stop)
        _record(layer_idx, joined, origins, context)
        _keep_tails(layer_idx, joined, context)
        if not any(joined.host_joins):
            return None if rerun is None else Fused(running, status, rerun)
        going_on = joined.merged.select((arrivals.source.index_select(0, joined.groups.last) >= 0).nonzero()[:, 0])
        state = group_state(going_on, running.state.layout.select(keep))
        status = status.absorb(layer_idx, running.state, SplitRows(stop, keep), going_on.mass)
        return Fused(running.select(keep, state), status, rerun)

    def _join(self, layer_idx: int, arrivals: Arrivals, config: FusionConfig, context: PassContext) -> _Joined:
        """Ask the policy about all pairs that may fuse, and chain those that are alike into groups."""
        rows = arrivals.rows
        later = self._candidates(arrivals, context).nonzero()[:, 0]
        earlier = later - 1
        view = PairView(
            layer_idx,
            self.layers.index(layer_idx),
            rows.hidden.index_select(0, earlier),
            rows.hidden.index_select(0, later),
            rows.positions.index_select(0, later),
            rows.token_ids.index_select(0, later),
        )
        decision = config.rule.ask(view)
        trace = context.trace.at(layer_idx)
        trace.signal_rows.update(decision.signal_rows)
        trace.rule_macs += decision.macs
        alike = torch.zeros_like(rows.mass, dtype=torch.bool).index_copy_(0, later, decision.alike)
        joins = chain(alike, rows.mass, config.max_group)
        groups = Groups.from_joins(joins)
        return _Joined(arrivals, joins, joins.tolist(), groups, merge(rows, groups))

    def _candidates(self, arrivals: Arrivals, context: PassContext) -> Tensor:
        """Return which rows may join the row before, [N] bool: of one sequence, adjacent, unprotected, new."""
        rows = arrivals.rows
        free = ~self._protection.covers(rows.token_ids, rows.positions)
        if not all(context.fuses):
            free &= torch.tensor(context.fuses, device=free.device).index_select(0, rows.seq_ids)
        adjacent = (rows.positions[1:] - rows.mass[1:] == rows.positions[:-1]) & (rows.seq_ids[1:] == rows.seq_ids[:-1])
        new = arrivals.source[1:] >= 0
        return torch.cat((free.new_zeros(1), free[1:] & free[:-1] & adjacent & new))

    def _rerun(self, layer_idx: int, joined: _Joined, context: PassContext) -> Rerun | None:
        """Return the tails that nobody absorbs any more and whose deeper entries are gone; note that they will run."""
        arrivals, tails = joined.arrivals, joined.arrivals.tails
        alone = [
            seq for seq, tail in tails.items() if not tail.ran and not arrivals.is_absorbed(seq, joined.host_joins)
        ]
        if not alone:
            return None
        for seq in alone:
            context.cache.tails.mark_run(layer_idx, seq)
        rows = FusionRows.concatenate([tails[seq].row for seq in alone])
        lengths = tuple(int(seq in alone) for seq in range(len(context.fuses)))
        layout = RaggedLayout(lengths, rows.seq_ids, rows.positions, torch.arange(len(rows), device=rows.mass.device))
        context.trace.at(layer_idx).fused -= len(alone)
        return Rerun(group_state(rows, layout), rows.token_ids, rows.update, rows.caps)


def _split(joined: _Joined) -> SplitRows:
    """Return the rows of the running state that are absorbed and those that go on."""
    source = joined.arrivals.source
    is_last = torch.zeros_like(joined.joins).index_fill_(0, joined.groups.last, True)
    return SplitRows(source[~is_last & (source >= 0)], source[is_last & (source >= 0)])


def _record(layer_idx: int, joined: _Joined, origins: Tensor, context: PassContext) -> None:
    """Take back the deeper entries of absorbed tails, and count what fused."""
    trace, arrivals = context.trace, joined.arrivals
    grown = torch.bincount(joined.groups.group_ids, minlength=len(joined.merged)) > 1
    sizes = Counter(joined.merged.mass[grown].tolist())
    fused = origins.shape[0]
    for seq, tail in arrivals.tails.items():
        if not arrivals.is_absorbed(seq, joined.host_joins):
            continue
        sizes.subtract(_size(tail))
        if not tail.ran:  # it was counted when it was absorbed first, and has no deeper entries
            continue
        fused += 1
        for change in context.cache.take_back(layer_idx, seq, tail.position):
            deeper = trace.at(change.layer_idx)
            deeper.fused -= not change.taken.ran  # absorbed, then uncovered: it is no row there any more
            deeper.group_sizes.subtract(_size(change.taken))
            deeper.group_sizes.update(_size(change.uncovered))
    if joined.merged.mean is not None:
        trace.at(layer_idx).signal_rows["mean"] += sum(joined.host_joins)
    trace.record_fusion(layer_idx, origins, fused, sizes)


def _size(tail: TailRow | None) -> dict[int, int]:
    """Return the group that a tail ends as a count by size; nothing where it stands alone."""
    return {} if tail is None or int(tail.row.members) == 1 else {int(tail.row.mass): 1}


def _keep_tails(layer_idx: int, joined: _Joined, context: PassContext) -> None:
    """Keep the last rows of each sequence for the pass to come."""
    arrivals, joins, tails = joined.arrivals, joined.host_joins, context.cache.tails
    group_of = list(accumulate((not join for join in joins), initial=-1))[1:]
    for seq, fuses in enumerate(context.fuses):
        own = arrivals.own_rows(seq)
        if fuses and len(own):
            newest = own[-tails.depth(layer_idx) :]
            positions = arrivals.rows.positions[newest.start : newest.stop].tolist()
            tails.push(
                layer_idx,
                seq,
                [
                    TailRow(_up_to(joined, row, group_of), at, joins[row])
                    for row, at in zip(newest, positions, strict=True)
                ],
            )


def _up_to(joined: _Joined, row: int, group_of: list[int]) -> FusionRows:
    """Return a row that stands for its group up to itself."""
    joins = joined.host_joins
    if row + 1 == len(joins) or not joins[row + 1]:
        return joined.merged.detached_row(group_of[row])
    first = group_of.index(group_of[row])
    part = joined.arrivals.rows.map(lambda value: value[first : row + 1])
    one = torch.arange(row + 1 - first, device=part.mass.device) > 0
    return merge(part, Groups.from_joins(one))
