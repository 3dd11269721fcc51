"""Halting: the rules that say which tokens have settled, as frozen configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quicksilver.core.rules.checks import (
    LARGE,
    Threshold,
    check_count,
    check_draw,
    check_parts,
    check_protection,
    check_threshold,
    is_whole,
)
from quicksilver.errors import PlanError


@dataclass(frozen=True)
class HaltingRule:
    """Base of the rules that say which tokens have settled."""

    @property
    def reads_gates(self) -> bool:
        """Whether the rule reads the plan's fitted gates."""
        return False

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the rule does not fit a model of `num_layers` layers."""


@dataclass(frozen=True)
class ThresholdRule(HaltingRule):
    """A rule that halts a token when its signal is below an absolute threshold."""

    threshold: Threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_threshold(type(self).__name__, self.threshold))

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as the model is deep."""
        check_count(self.threshold, num_layers)


@dataclass(frozen=True)
class DriftRule(ThresholdRule):
    """The paper's signal: `||h[l] - h[l-1]||_2`, in the units of the residual stream."""


@dataclass(frozen=True)
class RelativeDriftRule(ThresholdRule):
    """`||h[l] - h[l-1]||_2 / ||h[l]||_2`, without units."""


@dataclass(frozen=True)
class FixedPointRule(ThresholdRule):
    """Relative update norm below `threshold` and cosine of successive updates at least `min_cosine`."""

    min_cosine: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.min_cosine, (int, float)) or not -1.0 <= self.min_cosine <= 1.0:
            raise PlanError(f"FixedPointRule: min_cosine must lie in [-1, 1], got {self.min_cosine!r}")


@dataclass(frozen=True)
class EntropyRule(ThresholdRule):
    """Entropy, in bits, of the model's own head applied to the state; checked only at `layers` if given."""

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else (-1,)
        if any(not is_whole(i) or i < 0 for i in layers):
            raise PlanError(f"EntropyRule: layers must be non-negative layer indices, got {self.layers!r}")
        object.__setattr__(self, "layers", layers)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where thresholds or layers do not fit the depth."""
        super().check_depth(num_layers)
        if self.layers and max(self.layers) >= num_layers:
            raise PlanError(f"entropy is asked for after layer {max(self.layers)}, the model has {num_layers}")


@dataclass(frozen=True)
class FittedRule(ThresholdRule):
    """What a fitted gate predicts that halting would cost, in nats: KL(full prediction || the halted token's).

    The gates are the plan's tensors `gate.LAYER.weight`, [d + 4]: of the state over its root mean square, of the
    logarithm of the relative update's norm, of the cosine of successive updates, of the logarithm of the state's
    norm, and a constant; their product is the logarithm of the nats. A layer without a gate halts nobody.
    """

    @property
    def reads_gates(self) -> bool:
        """Whether the rule reads the plan's fitted gates."""
        return True


@dataclass(frozen=True)
class ForcedRule(HaltingRule):
    """The token at position p runs `depths[p % len(depths)]` layers: a fixed pattern, for tests and timing."""

    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        depths = tuple(self.depths) if isinstance(self.depths, (tuple, list)) else ()
        if not depths or any(not is_whole(n) or not 1 <= n < LARGE for n in depths):
            raise PlanError(f"ForcedRule: depths must be whole numbers of at least 1, got {self.depths!r}")
        object.__setattr__(self, "depths", depths)


@dataclass(frozen=True)
class RandomRule(HaltingRule):
    """The control: after each layer a token halts with `probability`, drawn from (seed, layer, position, token)."""

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_draw("RandomRule", self.probability, self.seed)


@dataclass(frozen=True)
class AllRule(HaltingRule):
    """Halts where every rule would, asked in the order given; a later one only about tokens that passed the earlier."""

    rules: tuple[HaltingRule, ...]

    def __post_init__(self) -> None:
        check_parts(self, "AllRule", ": ")
        if not self.rules:
            raise PlanError("AllRule: at least one rule is needed")

    @property
    def reads_gates(self) -> bool:
        """Whether a member reads the plan's fitted gates."""
        return any(rule.reads_gates for rule in self.rules)

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where a member does not fit the depth."""
        for rule in self.rules:
            rule.check_depth(num_layers)


@dataclass(frozen=True)
class HaltingConfig:
    """Which tokens halt, and which never may.

    Attributes:
        rule: says which tokens have settled.
        min_layer: layers that every token runs; a whole number, or a fraction of the depth in (0, 1).
        protect_first: tokens at positions below this never halt (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) never halt.
    """

    rule: HaltingRule
    min_layer: int | float = 2
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "halting")
        whole = is_whole(self.min_layer) and self.min_layer >= 1
        if not whole and not (isinstance(self.min_layer, float) and 0.0 < self.min_layer < 1.0):
            raise PlanError(f"halting.min_layer must be at least 1, or a fraction in (0, 1), got {self.min_layer!r}")
        check_protection("halting", self.protect_first, self.protect_special)

    def first_halt(self, num_layers: int) -> int:
        """Index of the first layer after which a token may halt in a model of `num_layers` layers."""
        if isinstance(self.min_layer, int):
            return self.min_layer - 1
        return math.ceil(self.min_layer * num_layers) - 1

    def check_depth(self, num_layers: int) -> None:
        """Raise PlanError where the configuration does not fit a model of `num_layers` layers."""
        if isinstance(self.min_layer, int) and self.min_layer > num_layers:
            raise PlanError(f"min_layer is {self.min_layer}, the model has {num_layers} layers")
        self.rule.check_depth(num_layers)
