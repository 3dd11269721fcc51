"""Drop: a halted token leaves no entry, so later tokens attend over fewer."""

from __future__ import annotations

from quicksilver.core.decisions import Fill, KVDecision
from quicksilver.rules import DropFill


def decide(fill: DropFill, layer_idx: int) -> KVDecision:
    """Write nothing."""
    return KVDecision(Fill.NONE)
