"""Width by channel, but no more bits than the token's entropy grants it."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import ChannelView, WidthChoice
from quicksilver.core.rules import CappedWidthRule
from quicksilver.policies.precision import channel


def decide(rule: CappedWidthRule, view: ChannelView) -> WidthChoice:
    """Choose a width for each channel and cut it to the token's."""
    choice = channel.decide(rule.channel, view)
    if view.caps is None:
        return choice
    return WidthChoice(torch.minimum(choice.widths, view.caps[:, None]), choice.signal_rows)  # type: ignore[arg-type]
