"""Share: deeper layers refer to the entry of the last layer that the token ran."""

from __future__ import annotations

from quicksilver.core.decisions import Fill, KVDecision
from quicksilver.core.rules import ShareFill


def decide(fill: ShareFill, layer_idx: int) -> KVDecision:
    """Refer to the token's newest entry."""
    return KVDecision(Fill.REFER)
