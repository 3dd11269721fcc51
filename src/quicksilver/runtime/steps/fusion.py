"""Fusion between two layers: ask the rule which neighbours are alike, chain them, keep the last of each group.

The rules are in `quicksilver.rules.fusion`, and in packages that bring others. Where tokens fuse at one layer, a group
may go on in the next pass: its last row waits in the sequence's cache (`OpenGroup`) and takes part again; where it is
absorbed, its entries in deeper layers are taken back. Where they fuse at several, the tokens of one pass fuse among
themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

import torch
from torch import Tensor

from quicksilver.backends.state import PassContext, SplitRows, State
from quicksilver.cache import OpenGroup
from quicksilver.core.decisions import PairView
from quicksilver.core.groups import FusionRows, Groups, merge
from quicksilver.core.trace import COUNT
from quicksilver.families.spec import Adapter
from quicksilver.rules import FusionConfig, FusionWeights
from quicksilver.rules.fusion.chain import chain
from quicksilver.runtime.protection import Protection


@dataclass(frozen=True)
class _FusionCandidates:
    """Rows at a fusion layer, sequence after sequence: its open group, if it has one, then the pass's own rows."""

    rows: FusionRows  # all of them, N
    source: Tensor  # [N] row of the running state, -1 for an open group
    open_groups: dict[int, OpenGroup]  # the open groups among them, by sequence
    bounds: list[int]  # row at which each sequence begins, and N at the end

    @classmethod
    def of_pass(cls, state: State, weights: FusionWeights, context: PassContext) -> _FusionCandidates:
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

    def with_open_groups(self, layer_idx: int, context: PassContext) -> _FusionCandidates:
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
        return _FusionCandidates(rows.select(order), source.index_select(0, order), found, bounds)

    def own_rows(self, seq: int) -> range:
        """Return the rows of a sequence that belong to the pass itself."""
        return range(self.bounds[seq] + (seq in self.open_groups), self.bounds[seq + 1])


@dataclass(frozen=True)
class _Joined:
    """Candidates and the groups that they form: who joins the row before [N], on the host; `merged` [G]."""

    candidates: _FusionCandidates
    joins: list[bool]
    groups: Groups
    merged: FusionRows

    def absorbed(self) -> list[int]:
        """Return the sequences whose open group a row of this pass joins."""
        candidates = self.candidates
        return [seq for seq in candidates.open_groups if self.joins[candidates.own_rows(seq).start]]


class FusionStep:
    """A fusion configuration, None for none, bound to a model."""

    def __init__(self, adapter: Adapter, config: FusionConfig | None, special_ids: Sequence[int]) -> None:
        self._config = config
        self._protection = Protection(config, special_ids, adapter.spec.device)
        # indices of the layers after which tokens fuse, ascending
        self.layers: tuple[int, ...] = () if config is None else config.after_layers(adapter.spec.num_layers)
        self.crosses_passes = len(self.layers) == 1  # a group may go on in the next pass

    def takes_part(self, prompt: Sequence[bool]) -> tuple[bool, ...]:
        """Return for each sequence whether its tokens may fuse, given whether they belong to a prompt."""
        scope = None if self._config is None else self._config.scope
        return tuple(scope == "all" or (scope == "prompt" and of_prompt) for of_prompt in prompt)

    def __call__(self, layer_idx: int, state: State, context: PassContext) -> None:
        config = self._config
        if config is None or not any(context.fuses) or not len(state.hidden):
            return
        candidates = _FusionCandidates.of_pass(state, config.weights, context)
        if self.crosses_passes:
            candidates = candidates.with_open_groups(layer_idx, context)
        joined = self._join(layer_idx, candidates, config, context)
        context.trace.rows[layer_idx, COUNT["fusion_rows"]] += len(state.hidden)
        if self.crosses_passes:
            _keep_open(layer_idx, joined, context)
        if not any(joined.joins):
            return
        split = _split(joined)
        _record(layer_idx, joined, state.layout.origin.index_select(0, split.stop), context)
        going_on = joined.merged.select((candidates.source.index_select(0, joined.groups.last) >= 0).nonzero()[:, 0])
        hidden = going_on.hidden if going_on.mean is None else going_on.mean.to(going_on.hidden.dtype)
        state.absorb(layer_idx, split, hidden, going_on.mass)

    def _join(
        self, layer_idx: int, candidates: _FusionCandidates, config: FusionConfig, context: PassContext
    ) -> _Joined:
        """Ask the rule about all pairs that may fuse, and chain those that are alike into groups."""
        rows = candidates.rows
        later = self._pairs(candidates, context).nonzero()[:, 0]
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
        context.trace.add_signals(layer_idx, decision.signal_rows, decision.macs)
        alike = torch.zeros_like(rows.mass, dtype=torch.bool).index_copy_(0, later, decision.alike)
        joins = chain(alike, rows.mass, config.max_group)
        groups, host_joins = Groups.from_joins(joins), joins.tolist()
        if rows.mean is not None:
            context.trace.add_signals(layer_idx, {"mean": sum(host_joins)})
        return _Joined(candidates, host_joins, groups, merge(rows, groups))

    def _pairs(self, candidates: _FusionCandidates, context: PassContext) -> Tensor:
        """Return which rows may join the row before, [N] bool: of one sequence, adjacent, unprotected, new."""
        rows = candidates.rows
        free = ~self._protection.covers(rows.token_ids, rows.positions)
        if not all(context.fuses):
            free &= torch.tensor(context.fuses, device=free.device).index_select(0, rows.seq_ids)
        adjacent = (rows.positions[1:] - rows.mass[1:] == rows.positions[:-1]) & (rows.seq_ids[1:] == rows.seq_ids[:-1])
        new = candidates.source[1:] >= 0
        return torch.cat((free.new_zeros(1), free[1:] & free[:-1] & adjacent & new))


def _as_row(group: OpenGroup, seq: int, like: Tensor) -> FusionRows:
    mass, position, token_id, seq_id = like.new_tensor([group.mass, group.position, group.token_id, seq])[:, None]
    return FusionRows(group.hidden, group.mean, mass, position, token_id, seq_id)


def _split(joined: _Joined) -> SplitRows:
    """Return the rows of the running state that are absorbed and those that go on."""
    source = joined.candidates.source
    is_last = torch.zeros_like(source, dtype=torch.bool).index_fill_(0, joined.groups.last, True)
    return SplitRows(source[~is_last & (source >= 0)], source[is_last & (source >= 0)])


def _record(layer_idx: int, joined: _Joined, origins: Tensor, context: PassContext) -> None:
    """Take back the deeper entries of open groups that are absorbed, count what fused, and note who joined whom."""
    trace, candidates = context.trace, joined.candidates
    grown = torch.bincount(joined.groups.group_ids, minlength=len(joined.merged)) > 1
    sizes, absorbed = Counter(joined.merged.mass[grown].tolist()), joined.absorbed()
    for seq in absorbed:
        group = candidates.open_groups[seq]
        context.caches[seq].retract(layer_idx, group.position)
        sizes[group.mass] -= group.mass > 1  # it has grown, and was counted before
    trace.record_fusion(layer_idx, origins, origins.shape[0] + len(absorbed), sizes)
    firsts = (candidates.rows.positions - candidates.rows.mass + 1).tolist()  # that each row stands for
    for seq, cache in enumerate(context.caches):
        own = candidates.own_rows(seq)
        cache.join(list(compress(firsts[own.start : own.stop], joined.joins[own.start : own.stop])))


def _keep_open(layer_idx: int, joined: _Joined, context: PassContext) -> None:
    """Keep the last row of each sequence, standing for its group, for the pass to come."""
    group_of = list(accumulate((not join for join in joined.joins), initial=-1))[1:]
    for seq, fuses in enumerate(context.fuses):
        own = joined.candidates.own_rows(seq)
        if not fuses or not len(own):
            continue
        row = joined.merged.select(joined.groups.last.new_tensor([group_of[own[-1]]]))
        position, token_id, mass = torch.cat((row.positions, row.token_ids, row.mass)).tolist()
        context.caches[seq].open_group = OpenGroup(layer_idx, position, token_id, mass, row.hidden, row.mean)
