"""The same width for everything."""

from quicksilver.core.decisions import ChannelView, WidthChoice
from quicksilver.rules import UniformWidthRule


def decide(rule: UniformWidthRule, view: ChannelView) -> WidthChoice:
    """Read `width` bits of every weight."""
    return WidthChoice(rule.width)
