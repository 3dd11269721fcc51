"""What a fusion rule is: it says of pairs of adjacent tokens whether they are alike."""

from dataclasses import dataclass

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import Threshold, check_threshold
from quicksilver.rules.registry import DecidingRule, RuleTypes


@dataclass(frozen=True)
class FusionRule(DecidingRule[PairView, FusionDecision]):
    """Base of the rules that say whether a token is like the one before it, of each pair in view."""

    def check_layers(self, num_fusion_layers: int) -> None:
        """Raise PlanError where the rule does not fit so many fusion layers."""


FUSION_RULES: RuleTypes[FusionRule] = RuleTypes("fusion rule", FusionRule)
fusion_rule = FUSION_RULES.register


@dataclass(frozen=True)
class SimilarityRule(FusionRule):
    """A rule that compares two adjacent tokens' vectors with an absolute threshold, or one per fusion layer."""

    threshold: Threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_threshold(type(self).__name__, self.threshold))

    def check_layers(self, num_fusion_layers: int) -> None:
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_fusion_layers:
            raise PlanError(f"{len(self.threshold)} thresholds for {num_fusion_layers} fusion layers")
