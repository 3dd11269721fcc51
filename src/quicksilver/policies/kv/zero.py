"""Zero: a halted token leaves a zero key and value, which still draw softmax mass."""

from __future__ import annotations

from quicksilver.core.decisions import Fill, KVDecision
from quicksilver.rules import ZeroFill


def decide(fill: ZeroFill, layer_idx: int) -> KVDecision:
    """Write zeros."""
    return KVDecision(Fill.ZERO)
