"""From scores to widths, by thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver.rules.precision import Thresholds


def widths_of(scores: Tensor, thresholds: Thresholds, widths: tuple[int, ...]) -> Tensor:
    """Return the width of each score, uint8: the first whose threshold it reaches, else the last."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # a narrower type would move the thresholds
    chosen = torch.full(scores.shape, widths[-1], dtype=torch.uint8, device=scores.device)
    for limit, wide, narrow in zip(thresholds, widths[:-1], widths[1:], strict=True):
        chosen += (scores >= limit).to(torch.uint8) * (wide - narrow)
    return chosen
