"""Halting between two layers: ask the policy, respect what is protected.

The rules themselves are in `quicksilver.policies.halting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.core.decisions import LayerView
from quicksilver.core.ragged import TokenState
from quicksilver.core.rules import HaltingConfig
from quicksilver.models.spec import Adapter
from quicksilver.policies import halting
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.protection import Protection
from quicksilver.runtime.status import SplitRows

_ENTROPY_ROWS = 256  # rows of logits held at a time


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
        self._protection = None if config is None else Protection(config, special_ids, adapter.spec.device)
        self.keeps_updates = config is not None and halting.needs_previous_update(config.rule)

    def protected(self, token_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Return which tokens of a pass may never halt, [N] bool; None where nothing can halt."""
        return None if self._protection is None else self._protection.covers(token_ids, positions)

    def decide(
        self,
        layer_idx: int,
        before: TokenState,
        after: TokenState,
        previous_update: Tensor | None,
        context: PassContext,
    ) -> SplitRows | None:
        """Return the rows that halt after a layer and those that go on, or None where none halts."""
        config, num_layers = self._config, self._adapter.spec.num_layers
        if config is None or context.protected is None or layer_idx == num_layers - 1:
            return None
        if layer_idx < config.first_halt(num_layers) or not halting.may_halt(config.rule, layer_idx):
            return None
        layout = after.layout
        token_ids, protected = (t.index_select(0, layout.origin) for t in (context.token_ids, context.protected))
        view = LayerView(
            layer_idx,
            before.hidden,
            after.hidden,
            previous_update,
            layout.positions,
            token_ids,
            self.head_entropy,
        )
        decision = halting.decide(config.rule, view)
        halt = decision.halt & ~protected
        rows = halt.nonzero().squeeze(-1)
        context.trace.record_halt(layer_idx, layout.origin.index_select(0, rows), decision.signal_rows)
        if rows.shape[0] == 0:
            return None
        going_on = halt.shape[0] - rows.shape[0]
        return SplitRows(rows, halt.argsort(stable=True)[:going_on])  # False first; the device is not asked again

    def head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of the head on states [M, d], [M]."""
        entropies = []
        for rows in hidden.split(_ENTROPY_ROWS):
            logits = self._adapter.head(self._adapter.final_norm(rows)).float()
            log_probs = torch.log_softmax(logits, dim=-1)
            entropies.append(-(log_probs.exp() * log_probs).sum(-1) / math.log(2))
        return torch.cat(entropies)
