"""Shortcuts: which tokens a sublayer would add little to that its fitted map does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quicksilver.core.decisions import ShortcutDecision, ShortcutView


def decide(gate: Tensor | None, threshold: float | None, view: ShortcutView) -> ShortcutDecision:
    """Let tokens past a sublayer where the gate predicts an error below the threshold.

    Args:
        gate: [d + 2] weights of the logarithm of the error, None where there is no threshold.
        threshold: of the error; None lets every token past that is not protected.
        view: what enters the sublayer.
    """
    free = torch.ones_like(view.state[:, 0], dtype=torch.bool) if view.protected is None else ~view.protected
    if gate is None or threshold is None:
        return ShortcutDecision(free, 0)
    if view.protected is None:
        return ShortcutDecision(log_error(gate, view.normed, view.state) < math.log(threshold), len(free))
    rows = free.nonzero().squeeze(-1)
    predicted = log_error(gate, view.normed.index_select(0, rows), view.state.index_select(0, rows))
    take = torch.zeros_like(free).index_copy_(0, rows, predicted < math.log(threshold))
    return ShortcutDecision(take, len(rows))


def log_error(gate: Tensor, normed: Tensor, state: Tensor) -> Tensor:
    """Return the predicted logarithm of the error of a sublayer's map, [N].

    Args:
        gate: [d + 2] weights of the normed input, of the logarithm of the state's norm, and a constant.
        normed: [N, d] the sublayer's normed input.
        state: [N, d] what it was normed from.
    """
    of_input = normed.to(gate.dtype) @ gate[:-2, None]  # [N, 1]
    return of_input[:, 0] + gate[-2] * log_norm(state.to(gate.dtype)) + gate[-1]


def log_norm(state: Tensor) -> Tensor:
    """Return the logarithm of the norm of states [N, d], float32 or wider, as gates see it: [N], finite for zeros."""
    return torch.linalg.vector_norm(state, dim=-1).clamp(min=torch.finfo(state.dtype).tiny).log()
