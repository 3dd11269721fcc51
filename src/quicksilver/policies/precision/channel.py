"""Width by channel: what contributes little to a product is read coarsely, or not at all."""

from __future__ import annotations

from torch import Tensor

from quicksilver.core.decisions import ChannelView, WidthChoice
from quicksilver.policies.precision.graded import widths_of
from quicksilver.rules import ChannelWidthRule


def decide(rule: ChannelWidthRule, view: ChannelView) -> WidthChoice:
    """Choose a width for each input channel of each token."""
    thresholds = rule.thresholds_at(view.layer_idx, view.map_idx, view.num_maps)
    scores = score(view)
    return WidthChoice(widths_of(scores, thresholds, rule.widths), {"score": scores.numel()})


def score(view: ChannelView) -> Tensor:
    """Return how much each channel of each token contributes, [N, in] float32 (or the inputs' wider type)."""
    return view.inputs.abs() * view.norms()
