"""KV fill: what stands in the cache for a halted token. The fill's type selects the handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quicksilver import rules
from quicksilver.core.decisions import KVDecision
from quicksilver.policies.kv import drop, propagate, zero

_HANDLERS: dict[type[rules.KVFill], Callable[[Any, int], KVDecision]] = {
    rules.DropFill: drop.decide,
    rules.ZeroFill: zero.decide,
    rules.PropagateFill: propagate.decide,
}


def decide(fill: rules.KVFill, layer_idx: int) -> KVDecision:
    """Return what is written in layer `layer_idx` for tokens that halted before it."""
    return _HANDLERS[type(fill)](fill, layer_idx)
