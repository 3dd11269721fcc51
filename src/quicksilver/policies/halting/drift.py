"""Raw drift, the paper's signal (arXiv 2506.22396): the L2 norm of what the layer added."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import DriftRule, threshold_at


def decide(rule: DriftRule, view: LayerView) -> HaltDecision:
    """Halt where `||after - before||_2` is below the threshold."""
    drift = torch.linalg.vector_norm(view.after - view.before, dim=-1, dtype=torch.float32)  # [N]
    return HaltDecision(drift < threshold_at(rule.threshold, view.layer_idx), {"norm": view.num_rows})
