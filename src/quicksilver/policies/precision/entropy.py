"""The paper's width policy: uncertain tokens read more bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quicksilver.core.bits import MAX_WIDTH
from quicksilver.core.decisions import ChannelView, TokenWidthView, WidthChoice
from quicksilver.policies.precision.graded import widths_of
from quicksilver.rules import EntropyWidthRule


def decide(rule: EntropyWidthRule, view: ChannelView) -> WidthChoice:
    """Read what the token was granted; everything before that was decided."""
    return WidthChoice(MAX_WIDTH if view.caps is None else view.caps)


def decide_tokens(rule: EntropyWidthRule, view: TokenWidthView) -> WidthChoice:
    """Grant each token a width by its entropy."""
    if rule.thresholds is None:
        raise ValueError("the rule's thresholds are not fitted")
    scores, signal = entropy_of(rule, view)
    return WidthChoice(widths_of(scores, rule.thresholds, rule.widths), {signal: scores.shape[0]})  # type: ignore[arg-type]


def entropy_of(rule: EntropyWidthRule, view: TokenWidthView) -> tuple[Tensor, str]:
    """Return each token's entropy in bits, [N], and the name of the signal that it is."""
    if rule.over == "head":
        return view.head_entropy(view.hidden), "head"
    log_probs = torch.log_softmax(view.hidden.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(2), "softmax"
