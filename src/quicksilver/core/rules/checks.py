"""What configurations of every mechanism check alike: thresholds, whole numbers, protection."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from quicksilver.errors import PlanError

Threshold = float | tuple[float, ...]
"""One absolute threshold for all layers, or one per layer."""

LARGE = 2**31
"""Bound of counts and positions in a plan, far above any model's context and far below what tensors hold."""


def threshold_at(threshold: Threshold, layer_idx: int) -> float:
    """Return the threshold that applies in or after layer `layer_idx`."""
    return threshold[layer_idx] if isinstance(threshold, tuple) else threshold


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_threshold(owner: str, value: Any, name: str = "threshold") -> Threshold:
    """Return a threshold as floats; `owner` and `name` say which it is in the PlanError raised for anything else."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or item != item or abs(item) > 1e300:
            raise PlanError(f"{owner}: {name} must be a number or a list of numbers, got {repr(item)[:40]}")
    return tuple(map(float, values)) if isinstance(value, (tuple, list)) else float(value)


def check_bounded(owner: str, name: str, value: Any, most: float) -> Threshold:
    """Return thresholds from 0 to `most`; `owner` and `name` say which they are in the PlanError raised for others."""
    threshold = check_threshold(owner, value, name)
    for each in threshold if isinstance(threshold, tuple) else (threshold,):
        if not 0.0 <= each <= most:
            allowed = "be 0 or more" if math.isinf(most) else f"lie in [0, {most:g}]"
            raise PlanError(f"{owner}: {name} must {allowed}, got {each!r}")
    return threshold


def check_count(threshold: Threshold, num_layers: int) -> None:
    """Raise PlanError where a list of thresholds has not one for each of the model's layers."""
    if isinstance(threshold, tuple) and len(threshold) != num_layers:
        raise PlanError(f"{len(threshold)} thresholds, the model has {num_layers} layers")


def check_protection(owner: str, protect_first: object, protect_special: object) -> None:
    """Raise PlanError where what a mechanism may never touch is not given as a count and a switch."""
    if not is_whole(protect_first) or not 0 <= protect_first < LARGE:
        raise PlanError(f"{owner}.protect_first must be a whole number from 0 to below 2**31, got {protect_first!r}")
    if not isinstance(protect_special, bool):
        raise PlanError(f"{owner}.protect_special must be true or false, got {protect_special!r}")


def check_draw(owner: str, probability: Any, seed: object) -> None:
    """Raise PlanError where a random control's probability or seed is none."""
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not number or not 0.0 <= probability <= 1.0:
        raise PlanError(f"{owner}: probability must lie in [0, 1], got {probability!r}")
    if not is_whole(seed):
        raise PlanError(f"{owner}: seed must be a whole number, got {seed!r}")
