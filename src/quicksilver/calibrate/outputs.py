"""Maps from a layer's state to the last layer's, and gates that predict what halting there would cost.

Both are ridge regressions: statistics of the frozen model on calibration text, fitted in closed form in a fixed number
of passes. There is no gradient and no network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.calibrate.observe import PROTECTED, Advance, layer_states
from quicksilver.calibrate.ridge import RidgeSums, named_tensors
from quicksilver.core.signals import gate_features
from quicksilver.families.spec import Adapter
from quicksilver.plan.affine import AffineMap

_LEAST_NATS = 1e-6  # divergences below are as good as none; keeps their logarithm finite
_HEAD_ROWS = 256  # rows of logits held at a time


def fit_maps(
    adapter: Adapter, layers: Sequence[int], windows: Sequence[Tensor], on_window: Advance = lambda: None
) -> dict[str, Tensor]:
    """Return `output.LAYER.*` of a plan: maps from states after some layers to what is missing to the last layer's."""
    d, device = adapter.spec.hidden_size, adapter.spec.device
    sums = {i: RidgeSums(d, d, device) for i in layers}
    for window in windows:
        states = layer_states(adapter, window)
        for i in layers:
            state = states[i + 1][PROTECTED:]
            sums[i].add(state, states[-1][PROTECTED:] - state)
        on_window()
    tensors = {}
    for i in layers:
        fitted = sums[i].solve(f"layer {i}")
        tensors |= named_tensors(f"output.{i}", sums[i].factors(fitted), fitted.bias)
    return tensors


def fit_gates(
    adapter: Adapter,
    tensors: dict[str, Tensor],
    layers: Sequence[int],
    windows: Sequence[Tensor],
    on_window: Advance = lambda: None,
) -> dict[str, Tensor]:
    """Return `gate.LAYER.weight` of a plan, given the tensors of the layers' maps.

    Gates predict, from features of a state, the logarithm of KL(full prediction || mapped state's prediction) in nats.
    """
    d, spec = adapter.spec.hidden_size, adapter.spec
    stored = {name: tensor.float() for name, tensor in tensors.items()}  # as a plan holds them
    maps = {i: AffineMap.named(stored, f"output.{i}", d).to(spec.device, spec.dtype) for i in layers}
    sums = {i: RidgeSums(d + 3, 1, spec.device) for i in layers}
    for window in windows:
        states = layer_states(adapter, window)
        for i in layers:
            before, after = states[i][PROTECTED:], states[i + 1][PROTECTED:]
            previous = before - states[i - 1][PROTECTED:] if i else None
            nats = divergence(adapter, states[-1][PROTECTED:], after + maps[i](after))
            sums[i].add(gate_features(before, after, previous), nats.clamp(min=_LEAST_NATS).log()[:, None])
        on_window()
    gates = {}
    for i in layers:
        fitted = sums[i].solve(f"layer {i}")
        gates[f"gate.{i}.weight"] = torch.cat((fitted.weight[:, 0], fitted.bias))
    return gates


@torch.no_grad()
def divergence(adapter: Adapter, full: Tensor, other: Tensor) -> Tensor:
    """Return KL(head of the full states || head of the others) of each row, [N] in nats."""
    nats = []
    for p, q in zip(full.split(_HEAD_ROWS), other.split(_HEAD_ROWS), strict=True):
        log_p, log_q = (torch.log_softmax(adapter.logits(x).float(), dim=-1) for x in (p, q))
        nats.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(nats)
