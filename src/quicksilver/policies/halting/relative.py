"""Relative drift: the norm of the update over the norm of the state, free of the stream's scale."""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import RelativeDriftRule, threshold_at


def relative_drift(view: LayerView) -> Tensor:
    """Return `||after - before||_2 / ||after||_2` for each token, [N]."""
    update = torch.linalg.vector_norm(view.after - view.before, dim=-1, dtype=torch.float32)
    return update / torch.linalg.vector_norm(view.after, dim=-1, dtype=torch.float32)


def decide(rule: RelativeDriftRule, view: LayerView) -> HaltDecision:
    """Halt where the relative drift is below the threshold."""
    halt = relative_drift(view) < threshold_at(rule.threshold, view.layer_idx)
    return HaltDecision(halt, {"norm": 2 * view.num_rows})
