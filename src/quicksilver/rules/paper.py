"""The rules of arXiv 2506.22396, literally: drift, distance and entropy in the units of the residual stream, zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from quicksilver.core.bits import MAX_BITS
from quicksilver.core.decisions import (
    BitsChoice,
    ChannelView,
    Fill,
    FusionDecision,
    HaltDecision,
    KernelBits,
    LayerView,
    PairView,
    TokenBitsView,
)
from quicksilver.errors import PlanError
from quicksilver.rules.checks import check_layers_run, layers_run, threshold_at
from quicksilver.rules.fusion.base import SimilarityRule, fusion_rule
from quicksilver.rules.halting.base import ThresholdRule, halting_rule
from quicksilver.rules.kv.base import FillRule, fill_rule
from quicksilver.rules.precision.base import precision_rule
from quicksilver.rules.precision.graded import GradedBitsRule

if TYPE_CHECKING:
    from torch import Tensor

EntropyOf = Literal["head", "hidden"]


@halting_rule("drift")
@dataclass(frozen=True)
class DriftRule(ThresholdRule):
    """The paper's signal: `||h[l] - h[l-1]||_2`, in the units of the residual stream (arXiv 2506.22396)."""

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        drift = signals.row_norms(signals.update_of(view))  # [N]
        return HaltDecision(drift < threshold_at(self.threshold, view.layer_idx), {"norm": view.num_rows})


@fill_rule("zero")
@dataclass(frozen=True)
class ZeroFill(FillRule):
    """The paper's formula read literally: a zero key and value are written; they still take softmax mass."""

    def decide(self, view: int) -> Fill:
        return Fill.ZERO


@fusion_rule("l2")
@dataclass(frozen=True)
class L2FusionRule(SimilarityRule):
    """The paper's: `||h[t] - h[t-1]||_2` below the threshold, in the units of the residual stream."""

    def decide(self, view: PairView) -> FusionDecision:
        from quicksilver.core import signals

        distance = signals.row_norms(view.later.float() - view.earlier.float())
        return FusionDecision(distance < threshold_at(self.threshold, view.ordinal), {"norm": view.num_pairs})


@precision_rule("entropy")
@dataclass(frozen=True)
class EntropyBitsRule(GradedBitsRule):
    """At one layer each token's entropy, in bits, decides how many bits it reads of every weight from there on."""

    # "head": entropy of the model's head on the state; "hidden": of a softmax over the state itself
    over: EntropyOf = "head"
    # how many layers have run by then, all at 8 bits; a whole number, or a fraction of the depth in (0, 1), rounded up
    layer: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, float):
            raise PlanError(f"EntropyBitsRule: target must be one share for each of {list(self.bits)}")
        if self.over not in get_args(EntropyOf):
            raise PlanError(f"EntropyBitsRule: over must be head or hidden, got {self.over!r}")
        check_layers_run("EntropyBitsRule: layer", self.layer)

    def after_layer(self, num_layers: int) -> int:
        return layers_run(self.layer, num_layers) - 1

    def decide(self, view: ChannelView) -> BitsChoice:
        """Read what the token was granted; everything before that was decided."""
        return BitsChoice(MAX_BITS if view.max_bits is None else view.max_bits)

    def decide_tokens(self, view: TokenBitsView) -> BitsChoice:
        from quicksilver.core.signals import graded

        if self.thresholds is None:
            raise PlanError("EntropyBitsRule: its thresholds are not fitted yet")
        scores, signal = self.score(view)
        return BitsChoice(graded(scores, self.thresholds, self.bits), {signal: scores.shape[0]})  # type: ignore[arg-type]

    def score(self, view: TokenBitsView) -> tuple[Tensor, str]:
        """Return each token's entropy in bits, [N]."""
        from quicksilver.core.signals import softmax_entropy

        if self.over == "head":
            return view.head_entropy(view.hidden), "head"
        return softmax_entropy(view.hidden), "softmax"

    def kernel_bits(self, layer_idx: int, map_idx: int, num_maps: int) -> KernelBits:
        """Return all bits: kernels read no more of them than each token was granted."""
        return KernelBits((MAX_BITS,))

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        if self.after_layer(num_layers) >= num_layers - 1:
            raise PlanError(f"bits decided after {self.layer!r} layers save nothing, the model has {num_layers}")
