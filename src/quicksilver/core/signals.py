"""What rules compute of states, and whether what they return is a decision."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quicksilver.core import decisions
from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.core.decisions import LayerView
from quicksilver.errors import PlanError

_TINY = torch.finfo(torch.float32).tiny
_MOST = 2**62  # a count must fit the trace's


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


_DECISIONS: dict[type, tuple[type, tuple[str, ...]]] = {
    LayerView: (decisions.HaltDecision, decisions.HALT_SIGNALS),
    decisions.PairView: (decisions.FusionDecision, decisions.PAIR_SIGNALS),
    decisions.ChannelView: (decisions.BitsChoice, decisions.BITS_SIGNALS),
    decisions.TokenBitsView: (decisions.BitsChoice, decisions.BITS_SIGNALS),
    int: (decisions.Fill, ()),
}
"""Of each kind of view, what decides about it returns, and which signals that may count."""


def check_decision(decider: str, decision: Any, view: object) -> None:
    """Raise PlanError where what a rule decided is no decision about the rows in view; `decider` names the rule."""
    wanted, signals = _DECISIONS[type(view)]
    if not isinstance(decision, wanted):
        raise PlanError(f"{decider}.decide must return a {wanted.__name__}, got {type(decision).__name__}")
    if isinstance(view, LayerView):
        _check_answer(decider, decision.halt, view.num_rows, "tokens")
    elif isinstance(view, decisions.PairView):
        _check_answer(decider, decision.alike, view.num_pairs, "pairs")
    elif isinstance(view, decisions.ChannelView):
        _check_bits(decider, decision.bits, (view.inputs.shape, view.inputs.shape[:1]))
    elif isinstance(view, decisions.TokenBitsView):
        _check_bits(decider, decision.bits, (view.hidden.shape[:1],))
    if signals:
        _check_costs(decider, decision, signals)


def _check_costs(decider: str, decision: Any, signals: tuple[str, ...]) -> None:
    rows = decision.signal_rows
    if not isinstance(rows, Mapping):
        raise PlanError(
            f"{decider}.decide must count signal_rows by name, as in {{{signals[0]!r}: 1}}, got {_kind(rows)}"
        )
    for signal in rows:
        if signal not in signals:
            names = ", ".join(signals)
            raise PlanError(f"{decider}.decide counts a signal {signal!r}; signals are {names}; count others as macs")
    named = {"macs": decision.macs, "gate_rows": getattr(decision, "gate_rows", 0)}
    for name, count in (named | {f"signal_rows[{signal!r}]": count for signal, count in rows.items()}).items():
        if type(count) is not int or not 0 <= count < _MOST:
            raise PlanError(f"{decider}.decide must count {name} as a whole number, 0 or more, got {repr(count)[:40]}")


def _check_answer(decider: str, answer: Tensor, num_rows: int, rows: str) -> None:
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != (num_rows,):
        raise PlanError(f"{decider}.decide must give one boolean for each of {num_rows} {rows}, got {_kind(answer)}")


def _check_bits(decider: str, bits: object, shapes: tuple[torch.Size, ...]) -> None:
    """Refuse bits of another type or shape; that they are 0, 2, 4, 6 or 8 is seen where they are read."""
    if isinstance(bits, Tensor) and bits.dtype == torch.uint8 and bits.shape in shapes:
        return
    if len(shapes) > 1 and type(bits) is int and bits in (0, *WEIGHT_BITS):
        return
    of = " or ".join(str(list(shape)) for shape in shapes)
    either = "0, 2, 4, 6 or 8 bits, or " if len(shapes) > 1 else ""
    got = _kind(bits) if isinstance(bits, Tensor) else repr(bits)[:40]
    raise PlanError(f"{decider}.decide must give {either}torch.uint8 bits of shape {of}, got {got}")


def _kind(answer: object) -> str:
    return f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__


def graded(scores: Tensor, thresholds: tuple[float, ...], bits: tuple[int, ...]) -> Tensor:
    """Return the bits of each score, uint8: the first whose threshold it reaches, else the last."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # a narrower type would move the thresholds
    chosen = torch.full(scores.shape, bits[-1], dtype=torch.uint8, device=scores.device)
    for limit, more, fewer in zip(thresholds, bits[:-1], bits[1:], strict=True):
        chosen += (scores >= limit).to(torch.uint8) * (more - fewer)
    return chosen


def softmax_entropy(logits: Tensor) -> Tensor:
    """Return the entropy, in bits, of a softmax over each row of [N, d], [N]."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(2)


def shortcut_error(gate: Tensor, normed: Tensor, state: Tensor) -> Tensor:
    """Return the predicted logarithm of the error of a sublayer's map, [N], for normed inputs [N, d] of states [N, d].

    The gate holds [d + 2] weights: of the normed input, of the logarithm of the state's norm, and a constant.
    """
    of_input = normed.to(gate.dtype) @ gate[:-2, None]  # [N, 1]
    return of_input[:, 0] + gate[-2] * log_norm(state.to(gate.dtype)) + gate[-1]


def log_norm(state: Tensor) -> Tensor:
    """Return the logarithm of the norm of states [N, d], float32 or wider, as gates see it: [N], finite for zeros."""
    return torch.linalg.vector_norm(state, dim=-1).clamp(min=torch.finfo(state.dtype).tiny).log()


@lru_cache(maxsize=16)
def pattern(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers of a forced pattern on a device; they are kept, as every layer asks for them."""
    return torch.tensor(values, device=device)


def gate_features(before: Tensor, after: Tensor, previous_update: Tensor | None) -> Tensor:
    """Return what a fitted gate multiplies but for its constant, of states [N, d] before and after a layer.

    That is [N, d + 3] float32: `after` over its root mean square; `log(||after - before|| / ||before||)`; the cosine of
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


_MASK = 0xFFFFFFFF


def hashed_uniform(seed: int, layer_idx: int, positions: Tensor, token_ids: Tensor, stream: int = 0) -> Tensor:
    """Return numbers in [0, 1) that depend on (seed, layer, position, token) alone, [N]; each stream has its own.

    Stateless, so prefill, decode and any batching draw the same number for the same token; the token is in it
    so that texts do not all share one pattern. The mixing is the 32-bit finaliser of MurmurHash3 (Austin
    Appleby, public domain), once for each part.
    """
    salt = (seed * 0x9E3779B1 + (layer_idx + 1) * 0x85EBCA77 + stream * 0xC2B2AE3D) & _MASK
    x = _finalise((positions.to(torch.int64) * 0x27D4EB2F + salt) & _MASK)
    x = _finalise(x ^ ((token_ids.to(torch.int64) * 0x165667B1) & _MASK))
    return (x & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def _finalise(x: Tensor) -> Tensor:
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK
    return x ^ (x >> 16)
