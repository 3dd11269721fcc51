"""Random halting: the control that any signal has to beat at the same mean depth."""

from __future__ import annotations

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import RandomRule
from quicksilver.policies.hashing import hashed_uniform


def decide(rule: RandomRule, view: LayerView) -> HaltDecision:
    """Halt each token with the rule's probability."""
    draws = hashed_uniform(rule.seed, view.layer_idx, view.positions, view.token_ids)
    return HaltDecision(draws < rule.probability)
