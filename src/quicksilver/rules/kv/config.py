"""KV: what halted tokens leave in the cache, in how many bits it is kept, and what of it is not read."""

import math
from dataclasses import dataclass, field

from quicksilver.core.bits import ENTRY_BITS, HALF_BITS
from quicksilver.core.checks import is_whole
from quicksilver.errors import PlanError
from quicksilver.rules.checks import Threshold, check_bounded, check_count, check_parts
from quicksilver.rules.kv.base import DropFill, FillRule


@dataclass(frozen=True)
class KVConfig:
    """What the cache holds, and what attention reads of it.

    A head decides for itself, of n entries that a query may see, in two steps. First all keys meet the large components
    of the query: an entry is left out where its weight, the softmax of these scores, is below `skip_below / n`. The
    others meet the other components, too. Of the softmax over these alone, values below `skip_below / n` are not read,
    and what is read is scaled to weigh 1. The heaviest entry stays in either step.

    Attributes:
        fill: what a halted token leaves in the layers that it does not run.
        bits: 8 (whole numbers, a scale for each 32 dimensions of an entry's K/V head) or 16 (bfloat16); None for the
            model's own. Keys are kept as they meet queries. Every token attends to what is kept, of itself too, so that
            how tokens are fed makes no difference.
        skip_below: in multiples of the mean weight `1 / n`, one number or one for each layer, at most 1; 0 skips
            nothing.
        estimate_dims_above: smaller components of a query, as it meets the keys, wait for the second step; in multiples
            of their root mean square. At 0 all are in the first.
    """

    fill: FillRule = field(default_factory=DropFill)
    bits: int | None = None
    skip_below: Threshold = 0.0
    estimate_dims_above: float = field(default=1.0, metadata={"off": True})

    def __post_init__(self) -> None:
        check_parts(self, "kv")
        if self.bits is not None and (not is_whole(self.bits) or self.bits not in (ENTRY_BITS, HALF_BITS)):
            raise PlanError(f"kv: bits must be {ENTRY_BITS} or {HALF_BITS}, got {repr(self.bits)[:40]}")
        object.__setattr__(self, "skip_below", check_bounded("kv", "skip_below", self.skip_below, 1.0))
        if isinstance(self.estimate_dims_above, (tuple, list)):
            raise PlanError("kv: estimate_dims_above must be one number for all layers")
        least = check_bounded("kv", "estimate_dims_above", self.estimate_dims_above, math.inf)
        object.__setattr__(self, "estimate_dims_above", least)

    @property
    def is_dense(self) -> bool:
        """Whether the cache of tokens that run every layer is kept and read in full."""
        return self.bits is None and self.skip_below == 0.0

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the list of thresholds is not as long as the model is deep."""
        check_count(self.skip_below, num_layers)
