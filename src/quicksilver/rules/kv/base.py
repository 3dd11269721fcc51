"""Fills: what a halted token leaves in the caches of the layers that it does not run, nothing or its projections."""

from dataclasses import dataclass

from quicksilver.core.decisions import Fill
from quicksilver.rules.registry import DecidingRule, RuleTypes


@dataclass(frozen=True)
class FillRule(DecidingRule[int, Fill]):
    """Base of the rules that say, of the index of a layer, what tokens that halted before it leave in its cache."""


FILL_RULES: RuleTypes[FillRule] = RuleTypes("fill rule", FillRule)
fill_rule = FILL_RULES.register


@fill_rule("drop")
@dataclass(frozen=True)
class DropFill(FillRule):
    """Nothing is written: later tokens attend over fewer entries."""

    def decide(self, view: int) -> Fill:
        return Fill.NONE


@fill_rule("propagate")
@dataclass(frozen=True)
class PropagateFill(FillRule):
    """The layer's own key and value projections of the frozen state are written: two small products per layer."""

    def decide(self, view: int) -> Fill:
        return Fill.PROJECT
