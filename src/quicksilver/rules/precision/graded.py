"""From scores to bits, by absolute thresholds: what rules by channel and by token have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.errors import PlanError
from quicksilver.rules.precision.base import PrecisionRule, check_bits

if TYPE_CHECKING:
    from torch import Tensor

Thresholds = tuple[float, ...]
"""Absolute thresholds between neighbouring bits, descending: at or above the first the first bits are read."""


@dataclass(frozen=True)
class GradedBitsRule(PrecisionRule):
    """A rule that reads more bits the higher a score is."""

    # absolute, descending, one fewer than `bits`: the first bits are read where the score is at least the first
    # threshold, and so on, the last bits where it is below all. None where not fitted yet.
    thresholds: Thresholds | tuple[Thresholds, ...] | None = None
    bits: tuple[int, ...] = (8, 4, 2)  # descending
    # what thresholds are fitted to: the share of each of `bits`, or their mean; None where they were given
    target: float | tuple[float, ...] | None = None
    skips: ClassVar[bool] = False  # whether 0 bits are allowed

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "bits", _checked_bits(name, self.bits, self.skips))
        object.__setattr__(self, "target", self._checked_target(self.target))
        if self.thresholds is None and self.target is None:
            raise PlanError(f"{name}: give thresholds, or a target to fit them to")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", self._checked_thresholds(self.thresholds))

    @abstractmethod
    def score(self, view: Any) -> tuple[Tensor, str]:
        """Return the score of each channel, or token, in view, and the name of the signal that it is."""

    @property
    def is_fitted(self) -> bool:  # type: ignore[override]
        return self.thresholds is not None

    def fitted(self, thresholds: Thresholds | tuple[Thresholds, ...]) -> Self:
        return replace(self, thresholds=thresholds)

    def _checked_thresholds(self, thresholds: Any) -> Thresholds:
        name, count = type(self).__name__, len(self.bits) - 1
        given = tuple(thresholds) if isinstance(thresholds, (tuple, list)) else (thresholds,)
        if len(given) != count or not all(map(_is_number, given)):
            raise PlanError(f"{name}: thresholds must be {count} numbers, one fewer than bits, got {repr(given)[:60]}")
        if any(b > a for a, b in pairwise(given)):
            raise PlanError(f"{name}: thresholds must descend, got {list(given)}")
        return tuple(map(float, given))

    def _checked_target(self, target: Any) -> float | tuple[float, ...] | None:
        name = type(self).__name__
        if target is None:
            return None
        if _is_number(target):
            if not self.bits[-1] <= target <= self.bits[0]:
                raise PlanError(f"{name}: a mean of {target!r} bits cannot be had from bits {list(self.bits)}")
            return float(target)
        shares = tuple(target) if isinstance(target, (tuple, list)) else ()
        if len(shares) != len(self.bits) or not all(_is_number(share) and share >= 0 for share in shares):
            raise PlanError(f"{name}: target must be a mean of bits, or one share for each of {list(self.bits)}")
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise PlanError(f"{name}: the shares of target must add up to 1, got {sum(shares):g}")
        return tuple(map(float, shares))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _checked_bits(name: str, bits: object, skips: bool) -> tuple[int, ...]:
    given = tuple(bits) if isinstance(bits, (tuple, list)) else ()
    if len(given) < 2:
        raise PlanError(f"{name}: bits must be two or more, got {bits!r}")
    for each in given:
        check_bits(f"{name}: each of bits", each, (0, *WEIGHT_BITS) if skips else WEIGHT_BITS)
    if any(b >= a for a, b in pairwise(given)):
        raise PlanError(f"{name}: bits must descend, got {list(given)}")
    return given
