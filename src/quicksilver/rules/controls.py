"""Controls: halting and fusion by fixed patterns, and by chance."""

from dataclasses import dataclass

from quicksilver.core.checks import is_whole
from quicksilver.core.decisions import FusionDecision, HaltDecision, LayerView, PairView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import LARGE, check_draw
from quicksilver.rules.fusion.base import FusionRule, fusion_rule
from quicksilver.rules.halting.base import HaltingRule, halting_rule

_STREAM = 1  # of random numbers, another than halting's: which tokens halt must not say which fuse


@halting_rule("forced")
@dataclass(frozen=True)
class ForcedRule(HaltingRule):
    """The token at position p runs `depths[p % len(depths)]` layers: a fixed pattern, for tests and timing."""

    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        depths = tuple(self.depths) if isinstance(self.depths, (tuple, list)) else ()
        if not depths or any(not is_whole(n) or not 1 <= n < LARGE for n in depths):
            raise PlanError(f"ForcedRule: depths must be whole numbers of at least 1, got {self.depths!r}")
        object.__setattr__(self, "depths", depths)

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        reached = layer_idx + 1 >= min(self.depths)
        return reached and (first is None or layer_idx == first or layer_idx + 1 in self.depths)

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        depths = signals.pattern(self.depths, view.positions.device)
        return HaltDecision(depths[view.positions % len(self.depths)] <= view.layer_idx + 1)


@halting_rule("random")
@dataclass(frozen=True)
class RandomRule(HaltingRule):
    """The control: after each layer a token halts with `probability`, drawn from (seed, layer, position, token)."""

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_draw("RandomRule", self.probability, self.seed)

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core.signals import hashed_uniform

        draws = hashed_uniform(self.seed, view.layer_idx, view.positions, view.token_ids)
        return HaltDecision(draws < self.probability)


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
