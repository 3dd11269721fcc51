"""Fusion: which adjacent tokens become one and what stands for them.

Each rule has its name, configuration and decision here; the decision imports PyTorch when it is first made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import (
    LARGE,
    Threshold,
    check_draw,
    check_parts,
    check_protection,
    check_threshold,
    is_whole,
    threshold_at,
)
from quicksilver.rules.registry import DecidingRule, RuleTypes
from quicksilver.rules.retired import refuse_retired

FusionWeights = Literal["last", "mass"]
FusionScope = Literal["prompt", "all"]

_STREAM = 1  # of random numbers, another than halting's: which tokens halt must not say which fuse


@dataclass(frozen=True)
class FusionRule(DecidingRule[PairView, FusionDecision]):
    """Base of the rules that say whether a token is like the one before it, of each pair in view."""

    def check_layers(self, num_fusion_layers: int) -> None:
        """Raise PlanError where the rule does not fit so many fusion layers."""


FUSION_RULES: RuleTypes[FusionRule] = RuleTypes("fusion rule", FusionRule)
fusion_rule = FUSION_RULES.register


@dataclass(frozen=True)
class SimilarityRule(FusionRule):
    """A rule that compares two adjacent tokens' vectors with an absolute threshold, or one per fusion layer."""

    threshold: Threshold

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_threshold(type(self).__name__, self.threshold))

    def check_layers(self, num_fusion_layers: int) -> None:
        """Raise PlanError where a list of thresholds is not as long as that of the fusion layers."""
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_fusion_layers:
            raise PlanError(f"{len(self.threshold)} thresholds for {num_fusion_layers} fusion layers")


@fusion_rule("l2")
@dataclass(frozen=True)
class L2FusionRule(SimilarityRule):
    """The paper's: `||h[t] - h[t-1]||_2` below the threshold, in the units of the residual stream."""

    def decide(self, view: PairView) -> FusionDecision:
        """Fuse where `||later - earlier||_2` is below the threshold."""
        from quicksilver.core import signals

        distance = signals.row_norms(view.later.float() - view.earlier.float())
        return FusionDecision(distance < threshold_at(self.threshold, view.ordinal), {"norm": view.num_pairs})


@fusion_rule("cosine")
@dataclass(frozen=True)
class CosineFusionRule(SimilarityRule):
    """Cosine of the two states above the threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for number in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if not -1.0 <= number <= 1.0:
                raise PlanError(f"a threshold of a cosine must lie in [-1, 1], got {number!r}")

    def decide(self, view: PairView) -> FusionDecision:
        """Fuse where the cosine of the two states is above the threshold."""
        from quicksilver.core import signals

        cosine = signals.row_cosines(view.earlier.float(), view.later.float())
        return FusionDecision(cosine > threshold_at(self.threshold, view.ordinal), {"cosine": view.num_pairs})


@fusion_rule("random")
@dataclass(frozen=True)
class RandomFusionRule(FusionRule):
    """The control: a token joins the one before with `probability`, drawn from (seed, layer, position, token)."""

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_draw("RandomFusionRule", self.probability, self.seed)

    def decide(self, view: PairView) -> FusionDecision:
        """Fuse each pair with the rule's probability."""
        from quicksilver.core.hashing import hashed_uniform

        draws = hashed_uniform(self.seed, view.layer_idx, view.positions, view.token_ids, _STREAM)
        return FusionDecision(draws < self.probability)


@fusion_rule("forced")
@dataclass(frozen=True)
class ForcedFusionRule(FusionRule):
    """The token at position p joins the one before it iff `joins[p % len(joins)]`: for tests and timing."""

    joins: tuple[bool, ...]

    def __post_init__(self) -> None:
        joins = tuple(self.joins) if isinstance(self.joins, (tuple, list)) else ()
        if not joins or any(not isinstance(join, bool) for join in joins):
            raise PlanError(f"ForcedFusionRule: joins must be a list of true and false, got {str(self.joins)[:40]}")
        object.__setattr__(self, "joins", joins)

    def decide(self, view: PairView) -> FusionDecision:
        """Fuse where the pattern says so at the later token's position."""
        from quicksilver.core import signals

        joins = signals.pattern(tuple(map(int, self.joins)), view.positions.device)
        return FusionDecision(joins[view.positions.remainder(len(self.joins))] == 1)


@dataclass(frozen=True)
class FusionConfig:
    """Which adjacent tokens fuse, where, and what goes on in their place.

    A group's representative is its last member, at that member's position; the members before it stop.

    Attributes:
        rule: says whether a token is like the one before it.
        layers: how many layers have run when tokens fuse; whole numbers, or fractions of the depth in (0, 1),
            rounded up. Several for scope "prompt" alone; then no group goes on in a later pass.
        max_group: most tokens that one representative stands for.
        weights: what the representative goes on with. "last": its own state. "mass": the members' mean, weighted
            by the tokens each stands for (the paper).
        scope: "prompt": only tokens whose predictions nobody asked for; "all": any token.
        protect_first: tokens at positions below this never fuse (attention sinks).
        protect_special: special tokens (BOS, EOS, ...) never fuse.
    """

    rule: FusionRule
    layers: tuple[int | float, ...] = (1 / 3,)
    max_group: int = 2
    weights: FusionWeights = "last"
    scope: FusionScope = "prompt"
    protect_first: int = 4
    protect_special: bool = True

    def __post_init__(self) -> None:
        check_parts(self, "fusion")
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else (self.layers,)
        object.__setattr__(self, "layers", layers)
        for item in layers:
            if not (is_whole(item) and item >= 1) and not (isinstance(item, float) and 0.0 < item < 1.0):
                raise PlanError(f"fusion.layers must be at least 1, or fractions in (0, 1), got {item!r}")
        if not layers:
            raise PlanError("fusion.layers is empty")
        alike = [(a, b) for a, b in pairwise(layers) if isinstance(a, int) == isinstance(b, int)]
        if any(b <= a for a, b in alike):  # a fraction and a whole number compare only when the depth is known
            raise PlanError(f"fusion.layers must ascend, got {list(layers)}")
        if not is_whole(self.max_group) or not 2 <= self.max_group < LARGE:
            raise PlanError(f"fusion.max_group must be a whole number from 2 to below 2**31, got {self.max_group!r}")
        refuse_retired("weights", self.weights, "fusion")
        if self.weights not in get_args(FusionWeights):
            raise PlanError(f"fusion.weights must be one of {', '.join(get_args(FusionWeights))}, got {self.weights!r}")
        if self.scope not in get_args(FusionScope):
            raise PlanError(f"fusion.scope must be one of {', '.join(get_args(FusionScope))}, got {self.scope!r}")
        if self.scope == "all" and len(layers) > 1:
            raise PlanError(
                f'fusion at several layers is for prompts, got layers {list(layers)} in scope "all": name one layer, or'
                ' use scope "prompt"'
            )
        check_protection("fusion", self.protect_first, self.protect_special)
        self.rule.check_layers(len(layers))

    def after_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers after which tokens fuse in a model of `num_layers` layers, ascending.

        Raises:
            PlanError: the configuration does not fit the depth.
        """
        run = [item if is_whole(item) else math.ceil(item * num_layers) for item in self.layers]
        if any(later <= earlier for earlier, later in pairwise(run)):
            raise PlanError(f"fusion.layers must ascend, got {list(self.layers)} in a model of {num_layers} layers")
        if run[-1] >= num_layers:
            raise PlanError(f"fusion after {run[-1]} layers saves nothing, the model has {num_layers}")
        return tuple(int(count) - 1 for count in run)
