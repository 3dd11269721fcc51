"""Relative drift: the paper's signal without the stream's scale."""

from dataclasses import dataclass

from quicksilver.core.decisions import HaltDecision, LayerView
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
