"""Propagate: the frozen state is projected by each deeper layer (two small products per layer)."""

from __future__ import annotations

from quicksilver.core.decisions import Fill, KVDecision
from quicksilver.rules import PropagateFill


def decide(fill: PropagateFill, layer_idx: int) -> KVDecision:
    """Project the frozen state."""
    return KVDecision(Fill.PROJECT)
