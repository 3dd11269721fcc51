"""What a halting rule is: it says after a layer which tokens have settled, and what it must see for that."""

from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.rules.checks import Threshold, check_count, check_threshold
from quicksilver.rules.registry import DecidingRule, RuleTypes


@dataclass(frozen=True)
class HaltingRule(DecidingRule[LayerView, HaltDecision]):
    """Base of the rules that say which tokens in view have settled, and halt after this layer."""

    rule_fields: ClassVar[tuple[str, ...]] = ()  # names of the fields that hold rules themselves, each a tuple of them
    reads_gates: ClassVar[bool] = False  # the plan's fitted gates, which are then in `LayerView.gate`
    reads_previous_update: ClassVar[bool] = False  # what the layer before added, then in `LayerView.previous_update`

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        """Whether the rule could halt anything after this layer; where not, it need not be asked.

        `first` is the first layer after which anything may halt, where every row is one token's throughout: a depth
        that is forced is then reached once. It is None where rows may take one another's places.
        """
        return True

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the rule does not fit a model of `num_layers` layers."""


HALTING_RULES: RuleTypes[HaltingRule] = RuleTypes("halting rule", HaltingRule)
halting_rule = HALTING_RULES.register


@dataclass(frozen=True)
class ThresholdRule(HaltingRule):
    """A rule that halts a token when its signal is below an absolute threshold."""

    threshold: Threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_threshold(type(self).__name__, self.threshold))

    def check_depth(self, num_layers: int) -> None:
        check_count(self.threshold, num_layers)
