"""What a fill is: it says what a halted token leaves in the caches of the layers that it does not run."""

from dataclasses import dataclass

from quicksilver.core.decisions import Fill
from quicksilver.rules.registry import DecidingRule, RuleTypes


@dataclass(frozen=True)
class FillRule(DecidingRule[int, Fill]):
    """Base of the rules that say, of the index of a layer, what tokens that halted before it leave in its cache."""


FILL_RULES: RuleTypes[FillRule] = RuleTypes("fill rule", FillRule)
fill_rule = FILL_RULES.register
