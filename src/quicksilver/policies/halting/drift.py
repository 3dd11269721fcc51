"""Raw drift, the paper's signal (arXiv 2506.22396): the L2 norm of what the layer added."""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import DriftRule, threshold_at


def decide(rule: DriftRule, view: LayerView) -> HaltDecision:
    """Halt where `||after - before||_2` is below the threshold."""
    drift = row_norms(update_of(view))  # [N]
    return HaltDecision(drift < threshold_at(rule.threshold, view.layer_idx), {"norm": view.num_rows})


def update_of(view: LayerView) -> Tensor:
    """Return what the layer added to each row, [N, d] in at least float32: float16 does not hold every difference."""
    dtype = torch.promote_types(view.after.dtype, torch.float32)
    return view.after.to(dtype) - view.before.to(dtype)


def row_norms(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of [N, d], in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
