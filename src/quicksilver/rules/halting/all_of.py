"""Several halting rules that must agree."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import check_parts
from quicksilver.rules.halting.base import HaltingRule, halting_rule


@halting_rule("all")
@dataclass(frozen=True)
class AllRule(HaltingRule):
    """Halts where every rule would, asked in the order given; a later one only about tokens that passed the earlier."""

    rule_fields: ClassVar[tuple[str, ...]] = ("rules",)
    rules: tuple[HaltingRule, ...]

    def __post_init__(self) -> None:
        check_parts(self, "AllRule", ": ")
        if not self.rules:
            raise PlanError("AllRule: at least one rule is needed")

    @property
    def reads_gates(self) -> bool:  # type: ignore[override]
        return any(rule.reads_gates for rule in self.rules)

    @property
    def reads_previous_update(self) -> bool:  # type: ignore[override]
        return any(rule.reads_previous_update for rule in self.rules)

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether every member could; that one's depth was reached before says nothing about the others."""
        return all(rule.may_halt(layer_idx) for rule in self.rules)

    def decide(self, view: LayerView) -> HaltDecision:
        decision = self.rules[0].ask(view)
        halt, costs = decision.halt, Counter(decision.signal_rows)
        gate_rows, macs = decision.gate_rows, decision.macs
        for rule in self.rules[1:]:
            open_rows = halt.nonzero().squeeze(-1)
            if open_rows.shape[0] == 0:
                break
            decision = rule.ask(view.select(open_rows))
            halt = halt.index_copy(0, open_rows, decision.halt)
            costs.update(decision.signal_rows)
            gate_rows += decision.gate_rows
            macs += decision.macs
        return HaltDecision(halt, costs, gate_rows=gate_rows, macs=macs)

    def check_depth(self, num_layers: int) -> None:
        for rule in self.rules:
            rule.check_depth(num_layers)
