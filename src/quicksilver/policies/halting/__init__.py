"""Halting: which tokens have settled. The rule's type selects the handler; one idea per file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quicksilver.core import rules
from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.policies.halting import combined, drift, entropy, fitted, fixed_point, forced, random, relative

Handler = Callable[[Any, LayerView], HaltDecision]

_HANDLERS: dict[type[rules.HaltingRule], Handler] = {
    rules.DriftRule: drift.decide,
    rules.RelativeDriftRule: relative.decide,
    rules.FixedPointRule: fixed_point.decide,
    rules.EntropyRule: entropy.decide,
    rules.FittedRule: fitted.decide,
    rules.ForcedRule: forced.decide,
    rules.RandomRule: random.decide,
}


def decide(rule: rules.HaltingRule, view: LayerView) -> HaltDecision:
    """Return which of the tokens in view halt after this layer under `rule`."""
    if isinstance(rule, rules.AllRule):
        return combined.decide(rule, view, decide)
    return _HANDLERS[type(rule)](rule, view)


def needs_previous_update(rule: rules.HaltingRule) -> bool:
    """Whether the rule compares successive updates, which the runtime then has to keep."""
    if isinstance(rule, rules.AllRule):
        return any(needs_previous_update(member) for member in rule.rules)
    return isinstance(rule, rules.FixedPointRule | rules.FittedRule)


def may_halt(rule: rules.HaltingRule, layer_idx: int, first: int | None = None) -> bool:
    """Whether the rule could halt anything after this layer; where not, it need not be asked.

    Args:
        rule: the rule.
        layer_idx: the layer.
        first: the first layer after which anything may halt, where every row is one token's throughout: a depth that is
            forced is then reached once. None where rows may take one another's places.
    """
    if isinstance(rule, rules.AllRule):
        return all(may_halt(member, layer_idx) for member in rule.rules)
    if isinstance(rule, rules.EntropyRule):
        return rule.layers is None or layer_idx in rule.layers
    if isinstance(rule, rules.ForcedRule):
        reached = layer_idx + 1 >= min(rule.depths)
        return reached and (first is None or layer_idx == first or layer_idx + 1 in rule.depths)
    return True
