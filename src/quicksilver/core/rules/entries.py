"""Cache entries: in how many bits keys and values are kept, as a frozen configuration."""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver.core.rules.checks import is_whole
from quicksilver.errors import PlanError

ENTRY_BITS = 8


@dataclass(frozen=True)
class EntryConfig:
    """Keys and values are kept as whole numbers, with one scale for each entry and K/V head.

    Keys are kept as they meet queries, rotated where the model rotates. Every token attends to what is kept, of itself
    too, so that how tokens are fed makes no difference.

    Attributes:
        bits: of a number; 8 is what there is.
    """

    bits: int = ENTRY_BITS

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits != ENTRY_BITS:
            raise PlanError(f"entries: bits must be {ENTRY_BITS}, got {repr(self.bits)[:40]}")
