"""The paper's formula read literally: a halted token's key and value are zero."""

from dataclasses import dataclass

from quicksilver.core.decisions import Fill
from quicksilver.rules.kv.base import FillRule, fill_rule


@fill_rule("zero")
@dataclass(frozen=True)
class ZeroFill(FillRule):
    """A zero key and value are written; they still take softmax mass."""

    def decide(self, view: int) -> Fill:
        """Write zeros."""
        return Fill.ZERO
