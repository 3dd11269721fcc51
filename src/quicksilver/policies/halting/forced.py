"""Forced depths by position: no signal at all, for oracle tests and for timing what skipping is worth."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import ForcedRule


@lru_cache(maxsize=16)
def _pattern(depths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(depths, device=device)


def decide(rule: ForcedRule, view: LayerView) -> HaltDecision:
    """Halt the tokens whose prescribed depth has been reached."""
    depths = _pattern(rule.depths, view.positions.device)
    return HaltDecision(depths[view.positions % len(rule.depths)] <= view.layer_idx + 1)
