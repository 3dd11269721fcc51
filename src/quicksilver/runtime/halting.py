"""Halting between two layers: ask the policy, respect what is protected, keep what has halted.

The rules themselves are in `quicksilver.policies.halting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quicksilver.core.decisions import LayerView
from quicksilver.core.ragged import RaggedLayout, TokenState
from quicksilver.core.rules import HaltingConfig
from quicksilver.core.trace import Trace
from quicksilver.models.spec import Adapter
from quicksilver.policies import halting

_ENTROPY_ROWS = 256  # rows of logits held at a time


class SplitRows(NamedTuple):
    """Rows of a state that halt and rows that go on, each ascending."""

    halt: Tensor
    keep: Tensor


class PassTokens(NamedTuple):
    """The tokens of a pass: their ids and which of them may never halt, each [N] in order of origin."""

    token_ids: Tensor
    protected: Tensor


@dataclass(frozen=True)
class HaltedTokens:
    """The tokens of this pass that have halted.

    Attributes:
        chunk: layout of all tokens of the pass.
        grid: [N, d] their frozen states at their origins (rows of running tokens are unset), None if none.
        rows: [M] origins of halted tokens, ascending, None if none.
    """

    chunk: RaggedLayout
    grid: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def none(cls, chunk: RaggedLayout) -> HaltedTokens:
        """Return the empty set of a pass."""
        return cls(chunk)

    def add(self, state: TokenState, split: SplitRows) -> HaltedTokens:
        """Add the rows of `state` that halt. The grid is written in place: the value added to is used up."""
        grid = self.grid
        if grid is None:
            grid = state.hidden.new_empty((self.chunk.num_tokens, state.hidden.shape[1]))
        rows = state.layout.origin.index_select(0, split.halt)
        grid.index_copy_(0, rows, state.hidden.index_select(0, split.halt))
        if split.keep.shape[0] == 0:
            return HaltedTokens(self.chunk, grid, self.chunk.origin)
        if self.rows is not None:
            rows = torch.cat((self.rows, rows)).sort().values
        return HaltedTokens(self.chunk, grid, rows)


class HaltingStep:
    """A halting configuration bound to a model.

    Args:
        adapter: the model, whose head some rules consult.
        config: which tokens halt; None for none.
        special_ids: token ids that are protected where the configuration says so.
    """

    def __init__(self, adapter: Adapter, config: HaltingConfig | None, special_ids: Sequence[int]) -> None:
        self._adapter = adapter
        self._config = config
        self._special_ids = torch.tensor(sorted(set(special_ids)), dtype=torch.int64, device=adapter.spec.device)
        self.keeps_updates = config is not None and halting.needs_previous_update(config.rule)

    def tokens(self, token_ids: Tensor, chunk: RaggedLayout) -> PassTokens | None:
        """Return what halting needs of a pass's tokens; None where nothing can halt."""
        config = self._config
        if config is None:
            return None
        protected = chunk.positions < config.protect_first
        if config.protect_special and self._special_ids.numel():
            protected = protected | torch.isin(token_ids, self._special_ids)
        return PassTokens(token_ids, protected)

    def decide(
        self,
        layer_idx: int,
        before: TokenState,
        after: TokenState,
        previous_update: Tensor | None,
        tokens: PassTokens | None,
        trace: Trace,
    ) -> SplitRows | None:
        """Return the rows that halt after a layer and those that go on, or None where none halts."""
        config, num_layers = self._config, self._adapter.spec.num_layers
        if config is None or tokens is None or layer_idx == num_layers - 1:
            return None
        if layer_idx < config.first_halt(num_layers) or not halting.may_halt(config.rule, layer_idx):
            return None
        layout = after.layout
        token_ids, protected = (t.index_select(0, layout.origin) for t in tokens)
        view = LayerView(
            layer_idx,
            before.hidden,
            after.hidden,
            previous_update,
            layout.positions,
            token_ids,
            self._head_entropy,
        )
        decision = halting.decide(config.rule, view)
        halt = decision.halt & ~protected
        rows = halt.nonzero().squeeze(-1)
        trace.record_halt(layer_idx, layout.origin.index_select(0, rows), decision.signal_rows)
        if rows.shape[0] == 0:
            return None
        going_on = halt.shape[0] - rows.shape[0]
        return SplitRows(rows, halt.argsort(stable=True)[:going_on])  # False first; the device is not asked again

    def _head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of the head on states [M, d], [M]."""
        entropies = []
        for rows in hidden.split(_ENTROPY_ROWS):
            logits = self._adapter.head(self._adapter.final_norm(rows)).float()
            log_probs = torch.log_softmax(logits, dim=-1)
            entropies.append(-(log_probs.exp() * log_probs).sum(-1) / math.log(2))
        return torch.cat(entropies)
