"""Cosine of two states, free of the stream's scale."""

from dataclasses import dataclass

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.fusion.base import SimilarityRule, fusion_rule


@fusion_rule("cosine")
@dataclass(frozen=True)
class CosineFusionRule(SimilarityRule):
    """Cosine of the two states above the threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for number in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if not -1.0 <= number <= 1.0:
                raise PlanError(f"a threshold of a cosine must lie in [-1, 1], got {number!r}")

    def decide(self, view: PairView) -> FusionDecision:
        from quicksilver.core import signals

        cosine = signals.row_cosines(view.earlier.float(), view.later.float())
        return FusionDecision(cosine > threshold_at(self.threshold, view.ordinal), {"cosine": view.num_pairs})
