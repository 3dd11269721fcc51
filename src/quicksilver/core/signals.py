"""What rules of halting and fusion compute of states, and whether what they return is a decision.

What of it says that a token has settled, or that two are alike, is the rules' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from quicksilver.core.decisions import HALT_SIGNALS, PAIR_SIGNALS, FusionDecision, HaltDecision, LayerView, PairView
from quicksilver.errors import PlanError

_TINY = torch.finfo(torch.float32).tiny


def update_of(view: LayerView) -> Tensor:
    """Return what the layer added to each row, [N, d] in at least float32: float16 does not hold every difference."""
    dtype = torch.promote_types(view.after.dtype, torch.float32)
    return view.after.to(dtype) - view.before.to(dtype)


def row_norms(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of [N, d], in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def row_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row of [N, d] and the same row of another, [N]."""
    return torch.cosine_similarity(x, y, dim=-1)


def relative_drift(view: LayerView) -> Tensor:
    """Return `||after - before||_2 / ||after||_2` for each token, [N]."""
    return row_norms(update_of(view)) / row_norms(view.after)


def update_cosine(view: LayerView) -> Tensor:
    """Return the cosine of each token's update and the one before it, which must be in view, [N]."""
    assert view.previous_update is not None
    update = update_of(view)
    return row_cosines(update, view.previous_update.to(update.dtype))


def nobody(view: LayerView) -> Tensor:
    """Return that no token halts, [N] bool."""
    return torch.zeros_like(view.positions, dtype=torch.bool)


def check_decision(decider: str, decision: object, view: object) -> None:
    """Raise PlanError where what a rule decided is no decision about the rows in view; `decider` names the rule."""
    if isinstance(view, LayerView):
        wanted, answer, rows, of, signals = HaltDecision, "halt", view.num_rows, "tokens", HALT_SIGNALS
    else:
        assert isinstance(view, PairView)
        wanted, answer, rows, of, signals = FusionDecision, "alike", view.num_pairs, "pairs", PAIR_SIGNALS
    if not isinstance(decision, wanted):
        raise PlanError(f"{decider}.decide must return a {wanted.__name__}, got {type(decision).__name__}")
    _check_answer(decider, getattr(decision, answer), rows, of)
    _check_signals(decider, decision.signal_rows, signals)


def _check_answer(decider: str, answer: Tensor, num_rows: int, rows: str) -> None:
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != (num_rows,):
        got = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise PlanError(f"{decider}.decide must give one boolean for each of {num_rows} {rows}, got {got}")


def _check_signals(decider: str, signal_rows: Mapping[str, int], known: tuple[str, ...]) -> None:
    for signal in signal_rows:
        if signal not in known:
            names = ", ".join(known)
            raise PlanError(f"{decider}.decide counts a signal {signal!r}; signals are {names}; count others as macs")


@lru_cache(maxsize=16)
def pattern(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers of a forced pattern on a device; they are kept, as every layer asks for them."""
    return torch.tensor(values, device=device)


def gate_features(before: Tensor, after: Tensor, previous_update: Tensor | None) -> Tensor:
    """Return what a fitted gate multiplies, but for its constant.

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


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_TINY)
