"""What passes between a model's layers on calibration text: its decoder is run with watched leaf operations."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from quicksilver.families.spec import Adapter, Apply, LayerOps
from quicksilver.plan import Plan
from quicksilver.rules import Part
from quicksilver.runtime.loop import Decoder

PROTECTED = 4
"""First tokens of a sequence, attention sinks: no mechanism touches them, so nothing is fitted to them."""


class SublayerRows(NamedTuple):
    """What a sublayer made of its tokens: state entering it, its normed input and its output, each [T, d]."""

    state: Tensor
    normed: Tensor
    output: Tensor


def watchable(adapter: Adapter) -> Adapter:
    """Return the model with its layers run one by one; compiled kernels run several in a call, unseen."""
    return replace(adapter, kernels="torch")


def run_window(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Run one window of tokens [T]; return its final states [T, d]."""
    ids = token_ids.to(decoder.spec.device)
    return decoder.run(ids, [len(ids)], decoder.new_cache(1), decoder.new_trace())


def run(adapter: Adapter, token_ids: Tensor, plan: Plan | None = None) -> Tensor:
    """Run one window of tokens [T] under a plan, dense unless given; return its final states [T, d]."""
    return run_window(Decoder(watchable(adapter), plan or Plan.dense()), token_ids)


def layer_states(adapter: Adapter, token_ids: Tensor) -> list[Tensor]:
    """Return the states of a window's tokens before the first layer and after each, [T, d] each."""
    states: list[Tensor] = []

    def watched(layer: LayerOps) -> LayerOps:
        def attn_norm(x: Tensor) -> Tensor:
            states.append(x)
            return layer.attn_norm(x)

        return replace(layer, attn_norm=attn_norm)

    last = run(replace(adapter, layers=tuple(map(watched, adapter.layers))), token_ids)
    return [*states, last]


def watch_sublayers(
    adapter: Adapter,
    units: Sequence[tuple[int, Part]],
    token_ids: Tensor,
    plan: Plan,
    see: Callable[[tuple[int, Part], SublayerRows], None],
) -> None:
    """Run a window [T] under a plan, and show what each of the given sublayers did; deeper layers are not run.

    The plan has no shortcut for these sublayers, and halts nobody.
    """
    depth = max(layer for layer, _ in units) + 1
    layers = list(adapter.layers[:depth])
    for unit in units:
        layer_idx, part = unit
        watch = _watch_mlp if part == "mlp" else _watch_attention
        layers[layer_idx] = watch(layers[layer_idx], lambda rows, unit=unit: see(unit, rows))
    run(replace(adapter.cut_behind(depth - 1), layers=tuple(layers)), token_ids, plan)


def _watch_mlp(layer: LayerOps, see: Callable[[SublayerRows], None]) -> LayerOps:
    entered: list[Tensor] = []

    def mlp_norm(x: Tensor) -> Tensor:
        entered[:] = [x]
        return layer.mlp_norm(x)

    def mlp(x: Tensor, apply: Apply) -> Tensor:
        output = layer.mlp(x, apply)
        see(SublayerRows(entered[0], x, output))
        return output

    return replace(layer, mlp_norm=mlp_norm, mlp=mlp)


def _watch_attention(layer: LayerOps, see: Callable[[SublayerRows], None]) -> LayerOps:
    entered: list[Tensor] = []

    def attn_norm(x: Tensor) -> Tensor:
        normed = layer.attn_norm(x)
        entered[:] = [x, normed]
        return normed

    def attn_output(x: Tensor, apply: Apply) -> Tensor:
        output = layer.attn_output(x, apply)
        see(SublayerRows(entered[0], entered[1], output))
        return output

    return replace(layer, attn_norm=attn_norm, attn_output=attn_output)
