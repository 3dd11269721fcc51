"""Precision: how many bits of each weight are read. The rule's type selects the handler; one idea per file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quicksilver import rules
from quicksilver.core.decisions import ChannelView, TokenWidthView, WidthChoice
from quicksilver.policies.precision import channel, entropy, uniform

Handler = Callable[[Any, ChannelView], WidthChoice]

_HANDLERS: dict[type[rules.PrecisionRule], Handler] = {
    rules.UniformWidthRule: uniform.decide,
    rules.EntropyWidthRule: entropy.decide,
    rules.ChannelWidthRule: channel.decide,
}


def decide(rule: rules.PrecisionRule, view: ChannelView) -> WidthChoice:
    """Return how many bits of one linear map's weights are read for its inputs."""
    return _HANDLERS[type(rule)](rule, view)


def token_rule(rule: rules.PrecisionRule) -> rules.EntropyWidthRule | None:
    """Return a rule that decides about whole tokens, None for any other."""
    return rule if isinstance(rule, rules.EntropyWidthRule) else None


def channel_rule(rule: rules.PrecisionRule | None) -> rules.ChannelWidthRule | None:
    """Return a rule that decides about channels, None for any other."""
    return rule if isinstance(rule, rules.ChannelWidthRule) else None


def decide_tokens(rule: rules.EntropyWidthRule, view: TokenWidthView) -> WidthChoice:
    """Return how many bits tokens may read from here on, [N]."""
    return entropy.decide_tokens(rule, view)
