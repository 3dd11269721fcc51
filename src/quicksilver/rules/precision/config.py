"""Precision: how many bits of each weight are read, and for which tokens always all of them."""

from dataclasses import dataclass

from quicksilver.rules.checks import check_parts, check_protection
from quicksilver.rules.precision.base import PrecisionRule


@dataclass(frozen=True)
class PrecisionConfig:
    """Who chooses bits, and for whom never.

    Attributes:
        rule: chooses bits.
        protect_first: tokens at positions below this read all bits (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) read all bits.
    """

    rule: PrecisionRule
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "precision")
        check_protection("precision", self.protect_first, self.protect_special)
