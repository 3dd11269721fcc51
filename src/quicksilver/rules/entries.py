"""Cache entries: in how many bits keys and values are kept, as a frozen configuration."""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver.core.bits import ENTRY_BITS, HALF_BITS
from quicksilver.errors import PlanError
from quicksilver.rules.checks import is_whole


@dataclass(frozen=True)
class EntryConfig:
    """Keys and values are kept in fewer bits than the model's own.

    In 8 bits they are whole numbers with one scale for each entry and K/V head, in 16 bits they are bfloat16. Keys are
    kept as they meet queries, rotated where the model rotates. Every token attends to what is kept, of itself too, so
    that how tokens are fed makes no difference.

    Attributes:
        bits: of a number: 8 or 16.
    """

    bits: int = ENTRY_BITS

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in (ENTRY_BITS, HALF_BITS):
            raise PlanError(f"entries: bits must be {ENTRY_BITS} or {HALF_BITS}, got {repr(self.bits)[:40]}")
