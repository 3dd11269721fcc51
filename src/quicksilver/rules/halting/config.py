"""Halting: which tokens stop early, what they predict from, and which sublayers they skip."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quicksilver.errors import PlanError
from quicksilver.rules.checks import check_layers_run, check_parts, check_protection, layers_run
from quicksilver.rules.halting.base import HaltingRule
from quicksilver.rules.halting.shortcuts import Shortcut
from quicksilver.rules.registry import guarded


@dataclass(frozen=True)
class HaltingConfig:
    """Which tokens halt, which skip sublayers, and which never may.

    Attributes:
        rule: says which tokens have settled; None where none halts.
        min_layer: layers that every token runs; a whole number, or a fraction of the depth in (0, 1).
        protect_first: tokens at positions below this never halt, and run every sublayer (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) never halt, and run every sublayer.
        output_maps: a token that stops predicts from its state and what its layer's fitted map adds to it, the tensors
            `output.LAYER.*`.
        shortcuts: fitted maps that stand in for sublayers, one for each at most.
        shortcuts_protect_first: as `protect_first`, for shortcuts alone where they differ; None where they do not.
        shortcuts_protect_special: as `protect_special`, likewise.
    """

    rule: HaltingRule | None = None
    min_layer: int | float = 2
    protect_first: int = 4
    protect_special: bool = True
    output_maps: bool = False
    shortcuts: tuple[Shortcut, ...] = ()
    shortcuts_protect_first: int | None = None
    shortcuts_protect_special: bool | None = None

    def __post_init__(self) -> None:
        check_parts(self, "halting")
        check_layers_run("halting.min_layer", self.min_layer)
        check_protection("halting", self.protect_first, self.protect_special)
        if not isinstance(self.output_maps, bool):
            raise PlanError(f"halting.output_maps must be true or false, got {self.output_maps!r}")
        if self.rule is None and not self.output_maps and not self.shortcuts:
            raise PlanError("halting.rule is missing, and there are no shortcuts and no output_maps")
        names = [shortcut.name for shortcut in self.shortcuts]
        if len(set(names)) != len(names):
            raise PlanError("halting.shortcuts must name each sublayer once")
        check_protection("halting", *self._of_shortcuts, prefix="shortcuts_")
        for name in ("protect_first", "protect_special"):
            if getattr(self, f"shortcuts_{name}") == getattr(self, name):  # one way to say it, and one hash
                object.__setattr__(self, f"shortcuts_{name}", None)

    @property
    def _of_shortcuts(self) -> tuple[int, bool]:
        first, special = self.shortcuts_protect_first, self.shortcuts_protect_special
        return self.protect_first if first is None else first, self.protect_special if special is None else special

    @property
    def for_shortcuts(self) -> HaltingConfig:
        """The configuration with the protection that shortcuts have."""
        first, special = self._of_shortcuts
        return replace(self, protect_first=first, protect_special=special)

    def first_halt(self, num_layers: int) -> int:
        """Index of the first layer after which a token may halt in a model of `num_layers` layers."""
        return layers_run(self.min_layer, num_layers) - 1

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the configuration does not fit a model of `num_layers` layers."""
        if self.rule is not None:
            if isinstance(self.min_layer, int) and self.min_layer > num_layers:
                raise PlanError(f"min_layer is {self.min_layer}, the model has {num_layers} layers")
            guarded(self.rule.check_depth, num_layers)
        for shortcut in self.shortcuts:
            if shortcut.layer >= num_layers:
                raise PlanError(f"a shortcut is for layer {shortcut.layer}, the model has {num_layers} layers")
