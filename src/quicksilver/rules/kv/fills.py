"""Fills: halted tokens leave nothing (the paper), or what their last state would have left."""

from dataclasses import dataclass

from quicksilver.core.decisions import Fill
from quicksilver.rules.kv.base import FillRule, fill_rule


@fill_rule("drop")
@dataclass(frozen=True)
class DropFill(FillRule):
    """Nothing is written: later tokens attend over fewer entries."""

    def decide(self, view: int) -> Fill:
        """Write nothing."""
        return Fill.NONE


@fill_rule("propagate")
@dataclass(frozen=True)
class PropagateFill(FillRule):
    """The layer's own key and value projections of the frozen state are written: two small products per layer."""

    def decide(self, view: int) -> Fill:
        """Project the frozen state."""
        return Fill.PROJECT
