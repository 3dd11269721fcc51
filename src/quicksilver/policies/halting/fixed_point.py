"""Fixed point: the update is small and keeps the direction of the one before it."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import FixedPointRule, threshold_at
from quicksilver.policies.halting.drift import update_of
from quicksilver.policies.halting.relative import relative_drift


def decide(rule: FixedPointRule, view: LayerView) -> HaltDecision:
    """Halt where relative drift is below the threshold and `cos(u[l], u[l-1])` at least `min_cosine`."""
    if view.previous_update is None:
        return HaltDecision(torch.zeros_like(view.positions, dtype=torch.bool))
    update = update_of(view)
    cosine = torch.cosine_similarity(update, view.previous_update.to(update.dtype), dim=-1)  # [N]
    small = relative_drift(view) < threshold_at(rule.threshold, view.layer_idx)
    return HaltDecision(small & (cosine >= rule.min_cosine), {"norm": 2 * view.num_rows, "cosine": view.num_rows})
