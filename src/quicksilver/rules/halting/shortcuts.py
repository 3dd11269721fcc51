"""Shortcuts: which tokens skip a sublayer, a fitted map of its input standing in for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from quicksilver.core.checks import is_whole
from quicksilver.core.decisions import ShortcutDecision, ShortcutView
from quicksilver.errors import PlanError
from quicksilver.rules.checks import LARGE

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["mlp", "attention"]


@dataclass(frozen=True)
class Shortcut:
    """A fitted map of a sublayer's normed input that stands in for the sublayer; tensors `shortcut.LAYER.PART.*`.

    The gate, where one is used, is the tensor `shortcut.LAYER.PART.gate`, [d + 2]: of the normed input, of the
    logarithm of the state's norm, and a constant; the product is the logarithm of the error.
    """

    layer: int  # index of the layer
    part: Part  # which of its sublayers
    # taken where the fitted gate predicts a smaller squared error, as a share of the squared norm of the state; None:
    # by every token
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.layer) or not 0 <= self.layer < LARGE:
            raise PlanError(f"layer must be a layer's index, got {self.layer!r}")
        if self.part not in get_args(Part):
            raise PlanError(f"part must be one of {', '.join(get_args(Part))}, got {self.part!r}")
        limit = self.threshold
        if limit is None:
            return
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0.0 < limit < 1e300:
            raise PlanError(f"threshold must be a positive number or null, got {limit!r}")
        object.__setattr__(self, "threshold", float(limit))

    @property
    def name(self) -> str:
        """Prefix of its tensors."""
        return f"shortcut.{self.layer}.{self.part}"

    def decide(self, gate: Tensor | None, view: ShortcutView) -> ShortcutDecision:
        """Let unprotected tokens skip the sublayer where the gate [d + 2], if any, predicts little enough error."""
        import torch

        from quicksilver.core.signals import shortcut_error

        free = torch.ones_like(view.state[:, 0], dtype=torch.bool) if view.protected is None else ~view.protected
        if gate is None or self.threshold is None:
            return ShortcutDecision(free, 0)
        limit = math.log(self.threshold)
        if view.protected is None:
            return ShortcutDecision(shortcut_error(gate, view.normed, view.state) < limit, len(free))
        rows = free.nonzero().squeeze(-1)
        predicted = shortcut_error(gate, view.normed.index_select(0, rows), view.state.index_select(0, rows))
        return ShortcutDecision(torch.zeros_like(free).index_copy_(0, rows, predicted < limit), len(rows))
