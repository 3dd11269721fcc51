"""Bits by channel: what contributes little to a product is read coarsely, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from quicksilver.core.decisions import BitsChoice, ChannelView, KernelBits
from quicksilver.errors import PlanError
from quicksilver.rules.precision.base import precision_rule
from quicksilver.rules.precision.graded import GradedBitsRule, Thresholds

if TYPE_CHECKING:
    from torch import Tensor


@precision_rule("channel")
@dataclass(frozen=True)
class ChannelBitsRule(GradedBitsRule):
    """For each token and each input channel of each linear map: the larger `|x_j| * ||W[j]||`, the more bits.

    Thresholds are one set for the whole model, or one set for each map of each layer, layer after layer.
    """

    bits: tuple[int, ...] = (8, 6, 4, 2, 0)
    # x is what the input differs by from its mean on calibration text, the plan's tensor `mean.LAYER.MAP`, [in]; the
    # mean's own product, all bits read, is added. A channel left out then stands at its mean, not at 0.
    centred: bool = False
    skips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.centred, bool):
            raise PlanError(f"ChannelBitsRule: centred must be true or false, got {self.centred!r}")

    @property
    def reads_means(self) -> bool:  # type: ignore[override]
        return self.centred

    def decide(self, view: ChannelView) -> BitsChoice:
        from quicksilver.core.signals import graded

        scores, signal = self.score(view)
        thresholds = self.thresholds_at(view.layer_idx, view.map_idx, view.num_maps)
        return BitsChoice(graded(scores, thresholds, self.bits), {signal: scores.numel()})

    def score(self, view: ChannelView) -> tuple[Tensor, str]:
        """Return how much each channel of each token contributes, [N, in] float32 (or the inputs' wider type)."""
        return view.inputs.abs() * view.norms(), "score"

    def kernel_bits(self, layer_idx: int, map_idx: int, num_maps: int) -> KernelBits:
        return KernelBits(self.bits, self.thresholds_at(layer_idx, map_idx, num_maps))

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        sets = self.thresholds
        if sets and isinstance(sets[0], tuple) and len(sets) != num_layers * num_maps:
            raise PlanError(f"{len(sets)} sets of thresholds, the model has {num_layers} x {num_maps} linear maps")

    def thresholds_at(self, layer_idx: int, map_idx: int, num_maps: int) -> Thresholds:
        """Return the thresholds of one linear map; PlanError where the rule is not fitted."""
        if self.thresholds is None:
            raise PlanError("ChannelBitsRule: its thresholds are not fitted yet")
        if isinstance(self.thresholds[0], tuple):
            return self.thresholds[layer_idx * num_maps + map_idx]  # type: ignore[return-value]
        return self.thresholds  # type: ignore[return-value]

    def _checked_thresholds(self, thresholds: Any) -> Any:
        given = tuple(thresholds) if isinstance(thresholds, (tuple, list)) else (thresholds,)
        if not given or not isinstance(given[0], (tuple, list)):
            return super()._checked_thresholds(given)
        return tuple(super(ChannelBitsRule, self)._checked_thresholds(each) for each in given)
