"""Key: the angle between adjacent tokens' keys, averaged over heads (Bolya et al. 2022, "Token Merging")."""

from __future__ import annotations

from torch.nn import functional as F

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.core.rules import KeyFusionRule, threshold_at


def decide(rule: KeyFusionRule, view: PairView) -> FusionDecision:
    """Fuse where the cosine of the two keys is above the threshold."""
    if view.earlier_keys is None or view.later_keys is None:
        raise ValueError("the key rule was asked without keys in view")
    earlier, later = (keys.float().mean(1) for keys in (view.earlier_keys, view.later_keys))
    cosine = F.cosine_similarity(earlier, later, dim=-1)
    return FusionDecision(cosine > threshold_at(rule.threshold, view.ordinal), {"key": view.num_pairs})
