"""Screening: which keys a query multiplies with its large components alone, as a frozen configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quicksilver.rules.checks import Threshold, check_bounded, check_count, threshold_at


@dataclass(frozen=True)
class ScreeningConfig:
    """Scores in two steps: a head's query meets all keys with its large components, those that count with the others.

    After the first step an entry is left out, its value unread, where its weight over the largest one, by what is known
    of their scores, is below `threshold / n`, n the entries that the query may see. What its components left out by an
    `AttentionConfig` multiply are no keys in either step.

    Attributes:
        threshold: in multiples of `1 / n`; 0 screens nothing in a layer.
        query_threshold: a component is large from this magnitude on, in multiples of the root mean square of a head's
            query, as it meets the keys.
    """

    threshold: Threshold
    query_threshold: Threshold = 1.0

    def __post_init__(self) -> None:
        for name in ("threshold", "query_threshold"):
            object.__setattr__(self, name, check_bounded("screening", name, getattr(self, name), math.inf))

    def threshold_in(self, layer_idx: int) -> float:
        """Return the threshold of entries in layer `layer_idx`."""
        return threshold_at(self.threshold, layer_idx)

    def query_threshold_in(self, layer_idx: int) -> float:
        """Return the threshold of queries' components in layer `layer_idx`."""
        return threshold_at(self.query_threshold, layer_idx)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        check_count(self.threshold, num_layers)
        check_count(self.query_threshold, num_layers)
