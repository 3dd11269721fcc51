"""Attention: which values and which components of a query are not read, as a frozen configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quicksilver.rules.checks import Threshold, check_bounded, check_count, threshold_at


@dataclass(frozen=True)
class AttentionConfig:
    """Values that weigh little are not read, and components of a query that are small multiply no keys.

    The two are independent. A head decides for itself: of n entries that a query may see it leaves out the values that
    weigh below `threshold / n`, and scales what it keeps to weigh 1 together; of its query, as it meets the keys, it
    leaves out the components of magnitude below `query_threshold` times their root mean square.

    Attributes:
        threshold: in multiples of the mean weight `1 / n`, at most 1 so that the largest weight is always kept; 0
            skips nothing.
        query_threshold: in multiples of the root mean square of a head's query; 0 skips nothing.
    """

    threshold: Threshold = 0.0
    query_threshold: Threshold = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_bounded("attention", "threshold", self.threshold, 1.0))
        limit = check_bounded("attention", "query_threshold", self.query_threshold, math.inf)
        object.__setattr__(self, "query_threshold", limit)

    def threshold_in(self, layer_idx: int) -> float:
        """Return the threshold of values in layer `layer_idx`."""
        return threshold_at(self.threshold, layer_idx)

    def query_threshold_in(self, layer_idx: int) -> float:
        """Return the threshold of queries' components in layer `layer_idx`."""
        return threshold_at(self.query_threshold, layer_idx)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        check_count(self.threshold, num_layers)
        check_count(self.query_threshold, num_layers)
