"""KV: what halted tokens leave in the cache, in how many bits it is kept, and what of it is not read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quicksilver.core.bits import ENTRY_BITS, HALF_BITS
from quicksilver.errors import PlanError
from quicksilver.rules.checks import Threshold, check_bounded, check_count, check_parts, is_whole
from quicksilver.rules.kv.base import FillRule
from quicksilver.rules.kv.fills import DropFill

_MOST = {
    "skip_values_below": 1.0,
    "drop_query_dims_below": math.inf,
    "screen_keys_below": math.inf,
    "screen_query_dims_below": math.inf,
}
"""Of each threshold, the largest."""


@dataclass(frozen=True)
class KVConfig:
    """What the cache holds, and what attention reads of it; thresholds are one number, or one for each layer.

    A head decides for itself, of n entries that a query may see. What `drop_query_dims_below` leaves out multiplies no
    key at all. With screening, scores are made in two steps: all keys meet the large components of the query; after
    that an entry is left out, its value unread, where its weight over the largest one, by what is known of their
    scores, is below `screen_keys_below / n`; the others meet the other components.

    Attributes:
        fill: what a halted token leaves in the layers that it does not run.
        bits: 8 (whole numbers, one scale for each entry and K/V head) or 16 (bfloat16); None for the model's own. Keys
            are kept as they meet queries. Every token attends to what is kept, of itself too, so that how tokens are
            fed makes no difference.
        skip_values_below: values that weigh less are not read, and what is read is scaled to weigh 1; in multiples of
            the mean weight `1 / n`, at most 1 so that the largest weight is always kept; 0 skips nothing.
        drop_query_dims_below: smaller components of a query, as it meets the keys, multiply none; in multiples of the
            root mean square of a head's query; 0 drops nothing.
        screen_keys_below: in multiples of `1 / n`; 0 screens nothing.
        screen_query_dims_below: smaller components meet only the keys that screening leaves, unit as of
            `drop_query_dims_below`.
    """

    fill: FillRule = field(default_factory=DropFill)
    bits: int | None = None
    skip_values_below: Threshold = 0.0
    drop_query_dims_below: Threshold = 0.0
    screen_keys_below: Threshold = 0.0
    screen_query_dims_below: Threshold = field(default=1.0, metadata={"off": True})

    def __post_init__(self) -> None:
        check_parts(self, "kv")
        if self.bits is not None and (not is_whole(self.bits) or self.bits not in (ENTRY_BITS, HALF_BITS)):
            raise PlanError(f"kv: bits must be {ENTRY_BITS} or {HALF_BITS}, got {repr(self.bits)[:40]}")
        for name, most in _MOST.items():
            object.__setattr__(self, name, check_bounded("kv", name, getattr(self, name), most))

    @property
    def is_dense(self) -> bool:
        """Whether the cache of tokens that run every layer is kept and read in full."""
        limits = self.skip_values_below, self.drop_query_dims_below, self.screen_keys_below
        return self.bits is None and limits == (0.0, 0.0, 0.0)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        for name in _MOST:
            check_count(getattr(self, name), num_layers)
