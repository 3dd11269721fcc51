"""Forced fusion: a fixed pattern over positions, for tests and timing."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.core.rules import ForcedFusionRule


def decide(rule: ForcedFusionRule, view: PairView) -> FusionDecision:
    """Fuse where the pattern says so at the later token's position."""
    joins = torch.tensor(rule.joins, device=view.positions.device)
    return FusionDecision(joins[view.positions.remainder(len(rule.joins))])
