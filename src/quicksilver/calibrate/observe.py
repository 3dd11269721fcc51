"""What passes through a model on calibration text: between its layers by watched leaf operations, or by hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from quicksilver.families.spec import Adapter, Apply, LayerOps
from quicksilver.plan import Plan
from quicksilver.rules import Part
from quicksilver.runtime.loop import Decoder

Advance = Callable[[], None]
"""Called after each step of what takes long."""

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
    """Run a window [T] under a plan that spares these sublayers, and show what each did; no deeper layers are run."""
    depth = max(layer for layer, _ in units) + 1
    layers = list(adapter.layers[:depth])
    for unit in units:
        layers[unit[0]] = _watched(layers[unit[0]], *_OPERATIONS[unit[1]], partial(see, unit))
    run(replace(adapter.cut_behind(depth - 1), layers=tuple(layers)), token_ids, plan)


_OPERATIONS: dict[Part, tuple[str, str]] = {"mlp": ("mlp_norm", "mlp"), "attention": ("attn_norm", "attn_output")}


def _watched(layer: LayerOps, norm_name: str, output_name: str, see: Callable[[SublayerRows], None]) -> LayerOps:
    entered: list[Tensor] = []

    def norm(x: Tensor) -> Tensor:
        entered[:] = [x, getattr(layer, norm_name)(x)]
        return entered[1]

    def output(x: Tensor, apply: Apply) -> Tensor:
        added = getattr(layer, output_name)(x, apply)
        see(SublayerRows(entered[0], entered[1], added))
        return added

    return replace(layer, **{norm_name: norm, output_name: output})


@contextmanager
def observing(
    modules: Sequence[nn.Module], observe: Callable[[int, Any, tuple[Any, ...], Tensor], None]
) -> Iterator[None]:
    """Call `observe` with which module, the module, its arguments and its output after each call of one of them."""
    with ExitStack() as hooks:
        for i, module in enumerate(modules):
            hooks.callback(module.register_forward_hook(partial(observe, i)).remove)
        yield
