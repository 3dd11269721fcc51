"""The drift of the paper (arXiv 2506.22396), in the units of the residual stream."""

from dataclasses import dataclass

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.halting.base import ThresholdRule, halting_rule


@halting_rule("drift")
@dataclass(frozen=True)
class DriftRule(ThresholdRule):
    """The paper's signal: `||h[l] - h[l-1]||_2`, in the units of the residual stream (arXiv 2506.22396)."""

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        drift = signals.row_norms(signals.update_of(view))  # [N]
        return HaltDecision(drift < threshold_at(self.threshold, view.layer_idx), {"norm": view.num_rows})
