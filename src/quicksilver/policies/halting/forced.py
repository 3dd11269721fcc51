"""Forced depths by position: no signal at all, for oracle tests and for timing what skipping is worth."""

from __future__ import annotations

import torch

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import ForcedRule


def decide(rule: ForcedRule, view: LayerView) -> HaltDecision:
    """Halt the tokens whose prescribed depth has been reached."""
    depths = torch.tensor(rule.depths, device=view.positions.device)
    return HaltDecision(depths[view.positions % len(rule.depths)] <= view.layer_idx + 1)
