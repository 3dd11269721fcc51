"""Entropy of the model's own head applied to the state: dear (the head is read), but what the model would say."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import EntropyRule, threshold_at


def decide(rule: EntropyRule, view: LayerView) -> HaltDecision:
    """Halt where the entropy, in bits, is below the threshold; only at the rule's layers."""
    if rule.layers is not None and view.layer_idx not in rule.layers:
        return HaltDecision(torch.zeros_like(view.positions, dtype=torch.bool))
    entropy = view.head_entropy(view.after)  # [N]
    return HaltDecision(entropy < threshold_at(rule.threshold, view.layer_idx), {"head": view.num_rows})
