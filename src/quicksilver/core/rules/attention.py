"""Attention: which values a query does not read, as a frozen configuration."""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver.core.rules.checks import Threshold, check_count, check_threshold, threshold_at
from quicksilver.errors import PlanError


@dataclass(frozen=True)
class AttentionConfig:
    """Values that weigh little are not read: of n entries that a query may see, those below `threshold / n`.

    A head decides for itself; what it keeps is scaled to weigh 1 together.

    Attributes:
        threshold: in multiples of the mean weight `1 / n`, at most 1 so that the largest weight is always kept; 0
            skips nothing.
    """

    threshold: Threshold

    def __post_init__(self) -> None:
        threshold = check_threshold("attention", self.threshold)
        for value in threshold if isinstance(threshold, tuple) else (threshold,):
            if not 0.0 <= value <= 1.0:
                raise PlanError(f"attention: threshold must lie in [0, 1], got {value!r}")
        object.__setattr__(self, "threshold", threshold)

    def threshold_in(self, layer_idx: int) -> float:
        """Return the threshold of layer `layer_idx`."""
        return threshold_at(self.threshold, layer_idx)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        check_count(self.threshold, num_layers)
