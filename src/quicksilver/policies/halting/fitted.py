"""The fitted gate: one product of cheap features predicts the logarithm of what halting would cost, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quicksilver.core.decisions import HaltDecision, LayerView
from quicksilver.core.rules import FittedRule, threshold_at

_TINY = torch.finfo(torch.float32).tiny


def gate_features(before: Tensor, after: Tensor, previous_update: Tensor | None) -> Tensor:
    """Return what a gate multiplies, but for its constant.

    Args:
        before: [N, d] states that entered a layer.
        after: [N, d] states that left it.
        previous_update: [N, d] what the layer before added, None where there was none.

    Returns:
        [N, d + 3] float32: `after` over its root mean square; `log(||after - before|| / ||before||)`; the cosine of
        this update and the previous one, 0 where there was none; `log(||after||)`. Norms are the Euclidean ones.
    """
    before, after = before.float(), after.float()
    update = after - before
    size, drift, start = (_norms(x) for x in (after, update, before))  # [N, 1] each
    cosine = torch.zeros_like(size)
    if previous_update is not None:
        cosine = torch.cosine_similarity(update, previous_update.float(), dim=-1)[:, None]
    normed = after / size * math.sqrt(after.shape[-1])
    return torch.cat((normed, drift.log() - start.log(), cosine, size.log()), dim=-1)


def decide(rule: FittedRule, view: LayerView) -> HaltDecision:
    """Halt where `exp(features . gate)` is below the threshold; nowhere after a layer without a gate."""
    if view.gate is None:
        return HaltDecision(torch.zeros_like(view.positions, dtype=torch.bool))
    features = gate_features(view.before, view.after, view.previous_update)
    log_nats = features @ view.gate[:-1] + view.gate[-1]  # [N]
    rows = view.num_rows
    costs = {"norm": 3 * rows} if view.previous_update is None else {"norm": 3 * rows, "cosine": rows}
    return HaltDecision(log_nats < _log(threshold_at(rule.threshold, view.layer_idx)), costs, gate_rows=rows)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_TINY)


def _log(threshold: float) -> float:
    return math.log(threshold) if threshold > 0.0 else -math.inf
