"""Fusion: which adjacent tokens are alike. The rule's type selects the handler; one idea per file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quicksilver.core import rules
from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.policies.fusion import cosine, forced, l2, random
from quicksilver.policies.fusion.chain import chain

__all__ = ["chain", "decide"]

_HANDLERS: dict[type[rules.FusionRule], Callable[[Any, PairView], FusionDecision]] = {
    rules.L2FusionRule: l2.decide,
    rules.CosineFusionRule: cosine.decide,
    rules.RandomFusionRule: random.decide,
    rules.ForcedFusionRule: forced.decide,
}


def decide(rule: rules.FusionRule, view: PairView) -> FusionDecision:
    """Return which of the pairs in view are alike under `rule`."""
    return _HANDLERS[type(rule)](rule, view)
