"""`all` of several rules; a later rule only looks at tokens that the earlier ones would halt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import AllRule, HaltingRule


def decide(
    rule: AllRule, view: LayerView, decide_member: Callable[[HaltingRule, LayerView], HaltDecision]
) -> HaltDecision:
    """Halt where every member would."""
    first = decide_member(rule.rules[0], view)
    answer, costs, gate_rows = first.halt, Counter(first.signal_rows), first.gate_rows
    for member in rule.rules[1:]:
        open_rows = answer.nonzero().squeeze(-1)
        if open_rows.shape[0] == 0:
            break
        decision = decide_member(member, view.select(open_rows))
        answer = torch.index_copy(answer, 0, open_rows, decision.halt)
        costs.update(decision.signal_rows)
        gate_rows += decision.gate_rows
    return HaltDecision(answer, costs, gate_rows)
