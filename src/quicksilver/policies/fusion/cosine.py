"""Cosine: the angle between adjacent tokens' states, free of the stream's scale."""

from __future__ import annotations

from torch.nn import functional as F

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.core.rules import CosineFusionRule, threshold_at


def decide(rule: CosineFusionRule, view: PairView) -> FusionDecision:
    """Fuse where the cosine of the two states is above the threshold."""
    cosine = F.cosine_similarity(view.earlier.float(), view.later.float(), dim=-1)
    return FusionDecision(cosine > threshold_at(rule.threshold, view.ordinal), {"cosine": view.num_pairs})
