"""Precision: the rules that say how many bits of each weight a token reads, as frozen configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, get_args

from quicksilver.errors import PlanError
from quicksilver.rules.checks import check_parts, check_protection, is_whole
from quicksilver.rules.retired import refuse_retired

EntropyOf = Literal["head", "hidden"]
WIDTHS = (2, 4, 6, 8)
"""Bits of a weight that can be read, besides none."""

Thresholds = tuple[float, ...]
"""Absolute thresholds between neighbouring widths, descending: at or above the first the first width is read."""


@dataclass(frozen=True)
class PrecisionRule:
    """Base of the rules that choose widths."""

    @property
    def is_fitted(self) -> bool:
        """Whether the rule can be run; where not, it says what its thresholds are to be fitted to."""
        return True

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        """Raise PlanError where the rule does not fit a model of `num_layers` layers of `num_maps` linear maps."""


@dataclass(frozen=True)
class UniformWidthRule(PrecisionRule):
    """Every weight is read at `width` bits."""

    width: int

    def __post_init__(self) -> None:
        _check_width("UniformWidthRule: width", self.width, WIDTHS)


@dataclass(frozen=True)
class GradedWidthRule(PrecisionRule):
    """A rule that reads more bits the higher a score is.

    Attributes:
        thresholds: absolute, descending, one fewer than `widths`: the first width is read where the score is at
            least the first threshold, and so on, the last width where it is below all. None where not fitted yet.
        widths: bits, descending.
        target: what thresholds are fitted to: the share of each width, or the mean number of bits; None where they
            were given.
    """

    thresholds: Thresholds | tuple[Thresholds, ...] | None = None
    widths: tuple[int, ...] = (8, 4, 2)
    target: float | tuple[float, ...] | None = None
    skips: ClassVar[bool] = False  # whether width 0 is allowed

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "widths", _checked_widths(name, self.widths, self.skips))
        object.__setattr__(self, "target", self._checked_target(self.target))
        if self.thresholds is None and self.target is None:
            raise PlanError(f"{name}: give thresholds, or a target to fit them to")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", self._checked_thresholds(self.thresholds))

    @property
    def is_fitted(self) -> bool:
        """Whether there are thresholds."""
        return self.thresholds is not None

    def fitted(self, thresholds: Thresholds | tuple[Thresholds, ...]) -> Self:
        """Return the rule with thresholds."""
        return replace(self, thresholds=thresholds)

    def _checked_thresholds(self, thresholds: Any) -> Thresholds:
        return _descending(type(self).__name__, thresholds, len(self.widths) - 1)

    def _checked_target(self, target: Any) -> float | tuple[float, ...] | None:
        name = type(self).__name__
        if target is None or _is_number(target):
            low, high = self.widths[-1], self.widths[0]
            if target is not None and not low <= target <= high:
                raise PlanError(f"{name}: a mean of {target!r} bits cannot be had from widths {list(self.widths)}")
            return target if target is None else float(target)
        shares = tuple(target) if isinstance(target, (tuple, list)) else ()
        if len(shares) != len(self.widths) or not all(_is_number(share) and share >= 0 for share in shares):
            raise PlanError(f"{name}: target must be a mean of bits, or one share for each of {list(self.widths)}")
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise PlanError(f"{name}: the shares of target must add up to 1, got {sum(shares):g}")
        return tuple(float(share) for share in shares)


@dataclass(frozen=True)
class EntropyWidthRule(GradedWidthRule):
    """The paper's: at one layer each token's entropy, in bits, decides the width of all it reads from there on.

    Attributes:
        over: "head": entropy of the model's head on the state; "hidden": of a softmax over the state itself.
        layer: how many layers have run by then, all at 8 bits; a whole number, or a fraction of the depth in
            (0, 1), rounded up.
    """

    over: EntropyOf = "head"
    layer: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, float):
            raise PlanError(f"EntropyWidthRule: target must be one share for each of {list(self.widths)}")
        if self.over not in get_args(EntropyOf):
            raise PlanError(f"EntropyWidthRule: over must be head or hidden, got {self.over!r}")
        whole = is_whole(self.layer) and self.layer >= 1
        if not whole and not (isinstance(self.layer, float) and 0.0 < self.layer < 1.0):
            raise PlanError(f"EntropyWidthRule: layer must be at least 1, or a fraction in (0, 1), got {self.layer!r}")

    def after_layer(self, num_layers: int) -> int:
        """Index of the layer after which tokens are asked, in a model of `num_layers` layers."""
        return (self.layer if isinstance(self.layer, int) else math.ceil(self.layer * num_layers)) - 1

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        """Raise PlanError where the layer is beyond the model's depth."""
        if self.after_layer(num_layers) >= num_layers - 1:
            raise PlanError(f"width decided after {self.layer!r} layers saves nothing, the model has {num_layers}")


@dataclass(frozen=True)
class ChannelWidthRule(GradedWidthRule):
    """For each token and each input channel of each linear map: the larger `|x_j| * ||W[j]||`, the more bits.

    Attributes:
        thresholds: one set for the whole model, or one set for each map of each layer, layer after layer.
        centred: x is what the input differs by from its mean on calibration text, the plan's tensor `mean.LAYER.MAP`,
            [in]; the mean's own product, all bits read, is added. A channel left out then stands at its mean, not at 0.
    """

    widths: tuple[int, ...] = (8, 6, 4, 2, 0)
    centred: bool = False
    skips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.centred, bool):
            raise PlanError(f"ChannelWidthRule: centred must be true or false, got {self.centred!r}")

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        """Raise PlanError where the sets of thresholds are not as many as the model has linear maps."""
        sets = self.thresholds
        if sets and isinstance(sets[0], tuple) and len(sets) != num_layers * num_maps:
            raise PlanError(f"{len(sets)} sets of thresholds, the model has {num_layers} x {num_maps} linear maps")

    @staticmethod
    def mean_name(layer_idx: int, map_idx: int) -> str:
        """Return the name of the tensor that holds the mean of a map's inputs."""
        return f"mean.{layer_idx}.{map_idx}"

    def thresholds_at(self, layer_idx: int, map_idx: int, num_maps: int) -> Thresholds:
        """Return the thresholds of one linear map.

        Raises:
            PlanError: the rule is not fitted.
        """
        if self.thresholds is None:
            raise PlanError("ChannelWidthRule: its thresholds are not fitted yet")
        if isinstance(self.thresholds[0], tuple):
            return self.thresholds[layer_idx * num_maps + map_idx]  # type: ignore[return-value]
        return self.thresholds  # type: ignore[return-value]

    def _checked_thresholds(self, thresholds: Any) -> Any:
        given = tuple(thresholds) if isinstance(thresholds, (tuple, list)) else (thresholds,)
        if not given or not isinstance(given[0], (tuple, list)):
            return super()._checked_thresholds(given)
        return tuple(super(ChannelWidthRule, self)._checked_thresholds(each) for each in given)


@dataclass(frozen=True)
class PrecisionConfig:
    """How many bits of each weight are read, and for which tokens always all of them.

    Attributes:
        rule: chooses widths.
        protect_first: tokens at positions below this read all bits (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) read all bits.
    """

    rule: PrecisionRule
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "precision")
        check_protection("precision", self.protect_first, self.protect_special)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _check_width(what: str, width: object, allowed: tuple[int, ...]) -> None:
    """Raise PlanError where a width is none of those that there are; `what` names it."""
    if is_whole(width) and width in allowed:
        return
    if is_whole(width):
        refuse_retired("width", width, what.partition(":")[0])
    raise PlanError(f"{what} must be one of {', '.join(map(str, allowed))}, got {width!r}")


def _checked_widths(name: str, widths: object, skips: bool) -> tuple[int, ...]:
    given = tuple(widths) if isinstance(widths, (tuple, list)) else ()
    if len(given) < 2:
        raise PlanError(f"{name}: widths must be two or more, got {widths!r}")
    for width in given:
        _check_width(f"{name}: each of widths", width, (0, *WIDTHS) if skips else WIDTHS)
    if any(b >= a for a, b in pairwise(given)):
        raise PlanError(f"{name}: widths must descend, got {list(given)}")
    return given


def _descending(name: str, values: Any, count: int) -> Thresholds:
    given = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    if len(given) != count or not all(_is_number(value) for value in given):
        raise PlanError(f"{name}: thresholds must be {count} numbers, one fewer than widths, got {repr(given)[:60]}")
    if any(b > a for a, b in pairwise(given)):
        raise PlanError(f"{name}: thresholds must descend, got {list(given)}")
    return tuple(float(value) for value in given)
