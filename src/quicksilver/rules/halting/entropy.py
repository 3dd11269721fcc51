"""Entropy of what the model's own head predicts from a state."""

from dataclasses import dataclass

from quicksilver.core.checks import is_whole
from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import threshold_at
from quicksilver.rules.halting.base import ThresholdRule, halting_rule


@halting_rule("entropy")
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

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        return self.layers is None or layer_idx in self.layers

    def decide(self, view: LayerView) -> HaltDecision:
        from quicksilver.core import signals

        if not self.may_halt(view.layer_idx):
            return HaltDecision(signals.nobody(view))
        entropy = view.head_entropy(view.after)  # [N]
        return HaltDecision(entropy < threshold_at(self.threshold, view.layer_idx), {"head": view.num_rows})

    def check_depth(self, num_layers: int) -> None:
        super().check_depth(num_layers)
        if self.layers and max(self.layers) >= num_layers:
            raise PlanError(f"entropy is asked for after layer {max(self.layers)}, the model has {num_layers}")
