"""Relative drift: the norm of the update over the norm of the state, free of the stream's scale."""

from __future__ import annotations

from torch import Tensor

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import RelativeDriftRule, threshold_at
from quicksilver.policies.halting.drift import row_norms, update_of


def relative_drift(view: LayerView) -> Tensor:
    """Return `||after - before||_2 / ||after||_2` for each token, [N]."""
    return row_norms(update_of(view)) / row_norms(view.after)


def decide(rule: RelativeDriftRule, view: LayerView) -> HaltDecision:
    """Halt where the relative drift is below the threshold."""
    halt = relative_drift(view) < threshold_at(rule.threshold, view.layer_idx)
    return HaltDecision(halt, {"norm": 2 * view.num_rows})
