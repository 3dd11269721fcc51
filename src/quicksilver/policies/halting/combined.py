"""`all` and `any` of several rules; a later rule only looks at tokens the earlier ones left open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import AllRule, AnyRule, CombinedRule, HaltingRule

Decide = Callable[[HaltingRule, LayerView], HaltDecision]


def decide_all(rule: AllRule, view: LayerView, decide: Decide) -> HaltDecision:
    """Halt where every member would."""
    return _narrow(rule, view, decide, keep_asking_where=True)


def decide_any(rule: AnyRule, view: LayerView, decide: Decide) -> HaltDecision:
    """Halt where at least one member would."""
    return _narrow(rule, view, decide, keep_asking_where=False)


def _narrow(rule: CombinedRule, view: LayerView, decide: Decide, keep_asking_where: bool) -> HaltDecision:
    """Ask each member about the rows on which all earlier members said `keep_asking_where`."""
    first = decide(rule.rules[0], view)
    answer, costs, gate_rows = first.halt, Counter(first.signal_rows), first.gate_rows
    for member in rule.rules[1:]:
        open_rows = (answer == keep_asking_where).nonzero().squeeze(-1)
        if open_rows.shape[0] == 0:
            break
        decision = decide(member, view.select(open_rows))
        answer = torch.index_copy(answer, 0, open_rows, decision.halt)
        costs.update(decision.signal_rows)
        gate_rows += decision.gate_rows
    return HaltDecision(answer, costs, gate_rows)
