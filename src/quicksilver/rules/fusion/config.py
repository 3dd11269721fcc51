"""Fusion: which adjacent tokens become one, where, and what stands for them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from quicksilver.core.checks import is_whole
from quicksilver.errors import PlanError
from quicksilver.rules.checks import LARGE, check_layers_run, check_parts, check_protection, layers_run
from quicksilver.rules.fusion.base import FusionRule
from quicksilver.rules.registry import guarded
from quicksilver.rules.retired import refuse_retired

FusionWeights = Literal["last", "mass"]
FusionScope = Literal["prompt", "all"]


@dataclass(frozen=True)
class FusionConfig:
    """Which adjacent tokens fuse, where, and what goes on in their place.

    A group's representative is its last member, at that member's position; the members before it stop.

    Attributes:
        rule: says whether a token is like the one before it.
        layers: how many layers have run when tokens fuse; whole numbers, or fractions of the depth in (0, 1), rounded
            up. Several for scope "prompt" alone; then no group goes on in a later pass.
        max_group: most tokens that one representative stands for.
        weights: what the representative goes on with. "last": its own state. "mass": the members' mean, weighted by the
            tokens each stands for (the paper).
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
            check_layers_run("fusion.layers", item)
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
        guarded(self.rule.check_layers, len(layers))

    def after_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices, ascending, of the layers after which tokens fuse; PlanError where the model has not as many."""
        run = [layers_run(item, num_layers) for item in self.layers]
        if any(later <= earlier for earlier, later in pairwise(run)):
            raise PlanError(f"fusion.layers must ascend, got {list(self.layers)} in a model of {num_layers} layers")
        if run[-1] >= num_layers:
            raise PlanError(f"fusion after {run[-1]} layers saves nothing, the model has {num_layers}")
        return tuple(count - 1 for count in run)
