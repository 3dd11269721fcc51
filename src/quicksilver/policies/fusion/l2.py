"""L2: the distance between adjacent tokens' states, the published signal; its units are the residual stream's."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.core.rules import L2FusionRule, threshold_at


def decide(rule: L2FusionRule, view: PairView) -> FusionDecision:
    """Fuse where `||later - earlier||_2` is below the threshold."""
    distance = torch.linalg.vector_norm(view.later.float() - view.earlier.float(), dim=-1)
    return FusionDecision(distance < threshold_at(rule.threshold, view.ordinal), {"norm": view.num_pairs})
