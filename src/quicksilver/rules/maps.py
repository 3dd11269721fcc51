"""Fitted maps and shortcuts: what closed-form fits on calibration text may stand in for, as frozen configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from quicksilver.errors import PlanError
from quicksilver.rules.checks import LARGE, check_parts, check_protection, is_whole

Part = Literal["mlp", "attention"]


@dataclass(frozen=True)
class MapConfig:
    """Where a fitted map from a layer's state to the last layer's is used; its tensors are `output.LAYER.*`.

    The map gives what is to be added to the state.

    Attributes:
        output: a halted token predicts from its mapped state.
    """

    output: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.output, bool):
            raise PlanError(f"maps.output must be true or false, got {self.output!r}")


@dataclass(frozen=True)
class Shortcut:
    """A fitted map of a sublayer's normed input that stands in for the sublayer; tensors `shortcut.LAYER.PART.*`.

    The gate, where one is used, is the tensor `shortcut.LAYER.PART.gate`, [d + 2]: of the normed input, of the
    logarithm of the state's norm, and a constant; the product is the logarithm of the error.

    Attributes:
        layer: index of the layer.
        part: which of its sublayers.
        threshold: taken where the fitted gate predicts a smaller squared error, as a share of the squared norm of
            the state; None: by every token.
    """

    layer: int
    part: Part
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.layer) or not 0 <= self.layer < LARGE:
            raise PlanError(f"layer must be a layer's index, got {self.layer!r}")
        if self.part not in get_args(Part):
            raise PlanError(f"part must be one of {', '.join(get_args(Part))}, got {self.part!r}")
        limit = self.threshold
        if limit is None:
            return
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0.0 < limit < 1e300:
            raise PlanError(f"threshold must be a positive number or null, got {limit!r}")
        object.__setattr__(self, "threshold", float(limit))

    @property
    def name(self) -> str:
        """Prefix of its tensors."""
        return f"shortcut.{self.layer}.{self.part}"


@dataclass(frozen=True)
class ShortcutConfig:
    """Which sublayers are replaced, and for whom never.

    Attributes:
        shortcuts: one for each sublayer at most.
        protect_first: tokens at positions below this run every sublayer.
        protect_special: special tokens run every sublayer.
    """

    shortcuts: tuple[Shortcut, ...]
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "shortcuts")
        names = [shortcut.name for shortcut in self.shortcuts]
        if not names or len(set(names)) != len(names):
            raise PlanError("shortcuts must name at least one sublayer, and each one once")
        check_protection("shortcuts", self.protect_first, self.protect_special)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a layer is not the model's."""
        for shortcut in self.shortcuts:
            if shortcut.layer >= num_layers:
                raise PlanError(f"a shortcut is for layer {shortcut.layer}, the model has {num_layers} layers")
