"""The fusion plans of a sweep: similarities indexed by one number, and the numbers that fuse the shares asked for.

Measuring the plans on other text is not done here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_args

import torch

from benchmarks.sweep import CONTROL, arithmetic, bisect, geometric
from quicksilver import rules
from quicksilver.measure.windows import Window
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder

WEIGHTS: tuple[rules.FusionWeights, ...] = get_args(rules.FusionWeights)
SWEPT: rules.FusionWeights = "last"  # measured at every share; the other weights at one


@dataclass(frozen=True)
class Similarity:
    """A family of rules indexed by one number: at `none` nothing fuses, at `all` as much as may."""

    rule: Callable[[float], rules.FusionRule]
    none: float
    all: float
    middle: Callable[[float, float], float]


SIMILARITIES = {
    CONTROL: Similarity(lambda p: rules.RandomFusionRule(p, seed=1), 0.0, 1.0, arithmetic),
    "l2": Similarity(rules.L2FusionRule, 1e-3, 1e4, geometric),
    "cosine": Similarity(rules.CosineFusionRule, 1.0, -1.0, arithmetic),
}


class Wanted(NamedTuple):
    """One plan to find: a similarity, what its groups go on with, and the share of the tokens fed to be fused."""

    similarity: str
    weights: rules.FusionWeights
    share: float


@dataclass(frozen=True)
class Setting:
    """What all plans of a sweep have in common.

    Attributes:
        layers: how many layers have run when tokens fuse, as whole numbers.
        max_group: most tokens that one representative stands for.
        scope: which tokens may fuse.
    """

    layers: tuple[int, ...]
    max_group: int
    scope: rules.FusionScope

    @classmethod
    def build(
        cls, layers: tuple[int | float, ...], max_group: int, scope: rules.FusionScope, num_layers: int
    ) -> Setting:
        """Resolve fractions of the depth, as a plan does.

        Raises:
            PlanError: the values make no plan for a model of `num_layers` layers.
        """
        config = rules.FusionConfig(rules.ForcedFusionRule((True,)), layers, max_group, scope=scope)
        return cls(tuple(index + 1 for index in config.after_layers(num_layers)), max_group, scope)

    def plan(self, similarity: str, weights: rules.FusionWeights, number: float) -> Plan:
        """Return the plan of a similarity's rule at a threshold or, at random, a probability."""
        rule = SIMILARITIES[similarity].rule(number)
        fusion = rules.FusionConfig(rule, self.layers, self.max_group, weights, self.scope)
        return Plan(f"{similarity}/{weights}", fusion=fusion)


def wanted(shares: Sequence[float], weights_share: float, max_group: int) -> list[Wanted]:
    """Return the plans to find: SWEPT weights at every share, the others at one; the control beyond both ends."""
    return [
        Wanted(similarity, weights, share)
        for similarity in SIMILARITIES
        for weights in WEIGHTS
        for asked in [{*shares, weights_share} if weights == SWEPT else {weights_share}]
        for share in sorted(_widened(asked, max_group) if similarity == CONTROL else asked)
    ]


def _widened(shares: set[float], max_group: int) -> set[float]:
    """Add a share below and one above, for similarities that fuse less or more of other text than asked."""
    most = 1.0 - 1.0 / max_group
    return {min(shares) / 2, *shares, min(2 * max(shares), (max(shares) + most) / 2)}


def find_plans(
    model: Any, setting: Setting, plans: Sequence[Wanted], windows: Sequence[Window]
) -> list[tuple[Wanted, Plan]]:
    """Return the plans that fuse the shares asked for on the calibration windows; those found nowhere are left out.

    A number is found once for all weights, with SWEPT: after one layer's fusion, which tokens are alike does not
    depend on them. With several layers it does, and the share that other weights get may differ more.
    """
    adapter = model.adapter.cut_behind(setting.layers[-1])  # it fuses alike, for less work
    numbers: dict[tuple[str, float], float | None] = {}
    for name, similarity in SIMILARITIES.items():

        @cache
        def share_at(number: float, name: str = name) -> float:
            decoder = Decoder(adapter, setting.plan(name, SWEPT, number), model.special_ids)
            return fused_share(decoder, windows, setting.scope)

        for share in sorted({plan.share for plan in plans if plan.similarity == name}):
            number = bisect(share_at, similarity.none, similarity.all, share, similarity.middle)
            numbers[name, share] = number
            print(f"{share:.1%} {name}: {'not reachable' if number is None else f'{number:.4g}'}", file=sys.stderr)
    found = ((plan, numbers[plan.similarity, plan.share]) for plan in plans)
    return [(plan, setting.plan(plan.similarity, plan.weights, n)) for plan, n in found if n is not None]


def fused_share(decoder: Decoder, windows: Sequence[Window], scope: rules.FusionScope) -> float:
    """Return the share of the tokens fed that a later one absorbs, each window fed at once but for its last token."""
    trace = decoder.new_trace()
    for window in windows:
        fed = torch.tensor(window.token_ids[:-1])
        decoder.run(fed, [len(fed)], decoder.new_cache(1), trace, prompt=scope == "prompt")
    return trace.fused_fraction
