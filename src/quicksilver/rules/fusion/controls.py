"""Controls: chance, and joins that are forced."""

from dataclasses import dataclass

from quicksilver.core.decisions import FusionDecision, PairView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import check_draw
from quicksilver.rules.fusion.base import FusionRule, fusion_rule

_STREAM = 1  # of random numbers, another than halting's: which tokens halt must not say which fuse


@fusion_rule("random")
@dataclass(frozen=True)
class RandomFusionRule(FusionRule):
    """The control: a token joins the one before with `probability`, drawn from (seed, layer, position, token)."""

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_draw("RandomFusionRule", self.probability, self.seed)

    def decide(self, view: PairView) -> FusionDecision:
        from quicksilver.core.signals import hashed_uniform

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
        from quicksilver.core import signals

        joins = signals.pattern(tuple(map(int, self.joins)), view.positions.device)
        return FusionDecision(joins[view.positions.remainder(len(self.joins))] == 1)
