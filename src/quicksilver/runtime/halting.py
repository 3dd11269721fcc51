"""Halting between two layers: ask the policy, respect what is protected.

The rules themselves are in `quicksilver.rules.halting`, and in packages that bring others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.core.decisions import LayerView
from quicksilver.core.ragged import TokenState
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.rules import HaltingConfig
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.protection import Protection
from quicksilver.runtime.status import SplitRows

_ENTROPY_ROWS = 256  # rows of logits held at a time


class HaltingStep:
    """A plan's halting configuration bound to a model.

    Args:
        adapter: the model, whose head some rules consult.
        plan: says which tokens halt, and holds the gates that say so.
        special_ids: token ids that are protected where the configuration says so.
    """

    def __init__(self, adapter: Adapter, plan: Plan, special_ids: Sequence[int]) -> None:
        config, spec = plan.halting, adapter.spec
        self._adapter = adapter
        gates = plan.fitted_gates(spec.num_layers, spec.hidden_size)
        self._gates = {layer_idx: gate.to(spec.device) for layer_idx, gate in gates.items()}
        self._rule = rule = None if config is None else config.rule
        self._protection = None if rule is None else Protection(config, special_ids, spec.device)
        self.keeps_updates = rule is not None and rule.reads_previous_update
        self._asked = () if config is None else _asked_layers(config, spec.num_layers, plan.fusion is not None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers after which the rule is asked, or whose update it will ask for."""
        if self.keeps_updates and self._asked:
            return tuple(range(max(self._asked[0] - 1, 0), self._adapter.spec.num_layers - 1))
        return self._asked

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
        rule = self._rule
        if rule is None or context.protected is None or layer_idx not in self._asked:
            return None
        layout, trace, gate = after.layout, context.trace.at(layer_idx), self._gates.get(layer_idx)
        token_ids, protected = (t.index_select(0, layout.origin) for t in (context.token_ids, context.protected))
        view = LayerView(
            layer_idx,
            before.hidden,
            after.hidden,
            previous_update,
            layout.positions,
            token_ids,
            self.head_entropy,
            gate,
        )
        decision = rule.ask(view)
        if gate is not None:
            trace.record_fitted(decision.gate_rows, gate.numel(), gate.nbytes)
        halt = decision.halt & ~protected
        rows = halt.nonzero().squeeze(-1)
        trace.rule_macs += decision.macs
        context.trace.record_halt(layer_idx, layout.origin.index_select(0, rows), decision.signal_rows)
        if rows.shape[0] == 0:
            return None
        going_on = halt.shape[0] - rows.shape[0]
        return SplitRows(rows, halt.argsort(stable=True)[:going_on])  # False first; the device is not asked again

    def head_entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy in bits of the head on states [M, d], [M]."""
        entropies = []
        for rows in hidden.split(_ENTROPY_ROWS):
            logits = self._adapter.logits(rows).float()
            log_probs = torch.log_softmax(logits, dim=-1)
            entropies.append(-(log_probs.exp() * log_probs).sum(-1) / math.log(2))
        return torch.cat(entropies)


def _asked_layers(config: HaltingConfig, num_layers: int, fuses: bool) -> tuple[int, ...]:
    """Return the indices of the layers after which the rule is asked, ascending."""
    if config.rule is None:
        return ()
    first, rule = config.first_halt(num_layers), config.rule
    known = None if fuses else first
    return tuple(i for i in range(first, num_layers - 1) if rule.may_halt(i, known))
