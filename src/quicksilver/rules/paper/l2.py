"""The similarity of the paper: distance, in the units of the residual stream."""

from dataclasses import dataclass

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.fusion.base import SimilarityRule, fusion_rule


@fusion_rule("l2")
@dataclass(frozen=True)
class L2FusionRule(SimilarityRule):
    """The paper's: `||h[t] - h[t-1]||_2` below the threshold, in the units of the residual stream."""

    def decide(self, view: PairView) -> FusionDecision:
        from quicksilver.core import signals

        distance = signals.row_norms(view.later.float() - view.earlier.float())
        return FusionDecision(distance < threshold_at(self.threshold, view.ordinal), {"norm": view.num_pairs})
