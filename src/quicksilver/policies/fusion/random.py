"""Random fusion: the control that any similarity has to beat at the same number of fused tokens."""

from __future__ import annotations

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.core.hashing import hashed_uniform
from quicksilver.core.rules import RandomFusionRule

_STREAM = 1  # another than halting's: which tokens halt must not say which fuse


def decide(rule: RandomFusionRule, view: PairView) -> FusionDecision:
    """Fuse each pair with the rule's probability."""
    draws = hashed_uniform(rule.seed, view.layer_idx, view.positions, view.token_ids, _STREAM)
    return FusionDecision(draws < rule.probability)
