"""Controls: depths that are forced, and chance."""

from dataclasses import dataclass

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import LARGE, check_draw, is_whole
from quicksilver.rules.halting.base import HaltingRule, halting_rule


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
