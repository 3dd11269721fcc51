"""What a layer adds to a state, free of the stream's scale: its size alone, or with its direction."""

from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.halting.base import ThresholdRule, halting_rule


@halting_rule("relative")
@dataclass(frozen=True)
class RelativeDriftRule(ThresholdRule):
    """`||h[l] - h[l-1]||_2 / ||h[l]||_2`, free of the stream's scale."""

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        small = signals.relative_drift(view) < threshold_at(self.threshold, view.layer_idx)
        return HaltDecision(small, {"norm": 2 * view.num_rows})


@halting_rule("fixed_point")
@dataclass(frozen=True)
class FixedPointRule(ThresholdRule):
    """Relative update norm below `threshold` and cosine of successive updates at least `min_cosine`."""

    reads_previous_update: ClassVar[bool] = True
    min_cosine: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.min_cosine, (int, float)) or not -1.0 <= self.min_cosine <= 1.0:
            raise PlanError(f"FixedPointRule: min_cosine must lie in [-1, 1], got {self.min_cosine!r}")

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        if view.previous_update is None:
            return HaltDecision(signals.nobody(view))
        small = signals.relative_drift(view) < threshold_at(self.threshold, view.layer_idx)
        steady = signals.update_cosine(view) >= self.min_cosine
        return HaltDecision(small & steady, {"norm": 2 * view.num_rows, "cosine": view.num_rows})
