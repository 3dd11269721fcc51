"""Compiled kernels: a quantized model's layers on the CPU, several at once where nobody need be asked in between.

What a layer is, is `torch.py`'s; this makes the same happen in one call.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.backends.base import LayerBackend
from quicksilver.backends.resolved import BoundShortcut, LayerPlan, ResolvedPlan
from quicksilver.backends.state import PassContext, State
from quicksilver.backends.torch import TorchBackend
from quicksilver.cache import extend
from quicksilver.core.bits import MAX_BITS
from quicksilver.core.decisions import Fill, KernelBits
from quicksilver.core.ragged import RaggedLayout
from quicksilver.core.trace import COUNT
from quicksilver.families.family import MapRole
from quicksilver.families.kernels import activation_name, norm_operands
from quicksilver.families.spec import Adapter, LayerOps
from quicksilver.ops import AttentionBackend, native
from quicksilver.ops.any_precision_linear import native_matrix
from quicksilver.rules.registry import guarded
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.joined import LargePages, lay_out


def unsupported_reason(adapter: Adapter, plan: ResolvedPlan) -> str | None:
    """Return why the kernels cannot run a model's layers under a plan, None where they can."""
    if not adapter.spec.is_quantized:
        return "its weights are plain; the kernels read quantized ones"
    if adapter.kernels != "native":
        return "the kernels do not read its weights"
    if any(map(_is_unknown, adapter.layers)):
        return "it has norms or an activation that the kernels do not know"
    if plan.bits is not None and guarded(plan.bits.kernel_bits, 0, 0, len(adapter.layers[0].quantized)) is None:
        return f"the kernels do not know how {type(plan.bits).__name__} chooses bits"
    if len({layer.fill for layer in plan.layers}) > 1:
        return "halted tokens leave something else in each layer"
    return None


def choose(adapter: Adapter, plan: ResolvedPlan, asked: Collection[int], attention: AttentionBackend) -> LayerBackend:
    """Return who runs a model's layers under a plan: decided here alone; which kernels multiply, by `families.kernels`.

    `asked` are the layers after which a step must be asked, `attention` which of PyTorch's runs where PyTorch does.
    """
    reason = unsupported_reason(adapter, plan)
    in_torch = TorchBackend(adapter, plan, attention, reason)
    return in_torch if reason is not None else NativeBackend(adapter, plan, asked, in_torch)


class NativeBackend:
    """A model's layers and a plan as the kernels see them; what they cannot run in a state, `otherwise` does.

    There is no `unsupported_reason` for them. `asked` are layers after which a step must be asked; each ends a span.
    """

    name = "native"
    reason = None

    def __repr__(self) -> str:
        return "<native backend: compiled kernels>"

    def __init__(self, adapter: Adapter, plan: ResolvedPlan, asked: Collection[int], otherwise: TorchBackend) -> None:
        spec = adapter.spec
        self._plan, self._spec, self._layers, self._otherwise = plan, spec, adapter.layers, otherwise
        self._modules, self._fill = adapter.modules, plan.layers[0].fill
        self._plain_head = adapter.normed_head is None  # PyTorch's threads multiply it next
        self._kept: list[Any] = []  # what the kernels hold addresses of
        self._ends = span_ends(spec.num_layers, asked)
        self._places: list[int] = [COUNT[name] for name in native.extension().COUNTS]
        self._pages = LargePages()
        self._joined = [self._lay_out(ops) for ops in adapter.layers]
        self._runner: Any = None

    def spans(self, state: State, context: PassContext) -> Iterator[range]:
        first = 0
        while first < self._spec.num_layers and (state.hidden.shape[0] or self._plan.fills):
            span = range(first, self._ends[first] if self._unsupported_reason(state, context) is None else first + 1)
            yield span
            first = span.stop

    def run(self, span: range, state: State, context: PassContext) -> None:
        """Where halted tokens' keys and values are projected, their states go along and leave as they came."""
        # Several layers were given because the kernels can run them.
        if len(span) == 1 and (why := self._unsupported_reason(state, context)) is not None:
            context.trace.fallbacks[why] += 1
            self._otherwise.run(span, state, context)
            return
        halted = state.halted if self._fill is Fill.PROJECT else None
        layout, rotations = (state.layout, state.rotations) if halted is None else (state.chunk, context.rotations)
        hidden = self._rows(state, halted)
        counts = context.trace.counts
        if self._runner is None:
            self._runner = self._new_runner()
        self._runner.run(
            span.start,
            span.stop,
            hidden.data_ptr(),
            hidden.shape[0],
            _fields(layout, halted, state, context),
            [address for each in rotations for address in (each.cos.data_ptr(), each.sin.data_ptr())],
            extend(context.caches, span, layout.lengths),
            len(layout.lengths),
            counts[span.start].data_ptr(),
            counts.stride(0),
            self._places,
            torch.get_num_threads(),
            self._plain_head and span.stop == self._spec.num_layers,
        )
        state.before = state.hidden
        state.hidden = hidden if halted is None else hidden.index_select(0, state.layout.origin)

    def _unsupported_reason(self, state: State, context: PassContext) -> str | None:
        """Return why PyTorch must run layers for a state, whatever has become of the model; None where it need not."""
        if any(context.fuses) or state.masses is not None or state.present is not state.chunk:
            return "tokens fuse"
        if self._modules is not None and self._modules.is_observed:
            return "hooks watch the layers"
        if self._layers[0].quantized[0].is_expanded:
            return "weights are kept as floats"
        if state.halted is not None and self._fill is Fill.ZERO:
            return "halted tokens leave zeros"
        if not state.hidden.shape[0] and self._fill is not Fill.PROJECT:
            return "no token runs on"
        hidden = state.hidden
        fit = hidden.dtype == torch.float32 and hidden.is_cpu and hidden.shape[1] == self._spec.hidden_size
        for rotation in state.rotations:
            fit = fit and rotation.cos.dtype == torch.float32 and rotation.cos.shape[-1] == self._spec.head_dim
        return None if fit else "states are not the model's, in float32 on the CPU"

    @staticmethod
    def _rows(state: State, halted: Tensor | None) -> Tensor:
        """Return the states of all rows of a run, a tensor of their own."""
        if halted is None or state.frozen is None:
            return state.hidden.clone(memory_format=torch.contiguous_format)
        return state.frozen.clone().index_copy_(0, state.layout.origin, state.hidden)

    def _new_runner(self) -> Any:
        spec, first = self._spec, self._layers[0]
        return native.extension().LayerRunner(
            [self._layer(*each) for each in zip(range(spec.num_layers), self._layers, self._plan.layers, strict=True)],
            spec.hidden_size,
            first.quantized[-1].num_inputs,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            activation_name(first.activation),
            self._plan.entry_bits or 8 * torch.float32.itemsize,
        )

    def _layer(self, layer_idx: int, ops: LayerOps, plan: LayerPlan) -> Any:
        layer = native.extension().Layer()
        for name, norm in ops.norms.items():
            layer.set_norm(name, *self._norm(norm))
        layer.set_sublayers(ops.norms_projections, ops.residual_scale or 1.0)
        for map_idx, (role, module) in enumerate(zip(ops.spec.maps, ops.quantized, strict=True)):
            self._set_map(layer, layer_idx, map_idx, role, module)
        for of_attention, matrix in self._joined[layer_idx].items():
            layer.join_maps(of_attention, matrix)
        for shortcut in (plan.attention, plan.mlp):
            if shortcut is not None:
                self._set_shortcut(layer, shortcut)
        layer.set_attention(
            ops.spec.scaling,
            plan.skip_below,
            plan.estimate_dims_above,
            ops.spec.softcap or 0.0,
        )
        layer.set_key_centre(self._address(plan.key_centre))
        layer.set_place(ops.spec.window or 0, -1 if ops.spec.rotary is None else ops.spec.rotary)
        return layer

    def _lay_out(self, ops: LayerOps) -> dict[bool, Any]:
        """Lay a layer's maps out in memory; return those of one input as one matrix, by whether it is attention's."""
        maps = dict(zip(ops.spec.maps, ops.quantized, strict=True))
        found: dict[bool, Any] = {}
        for roles in (("query", "key", "value"), ("output",), ("gate", "up"), ("down",)):
            modules = [maps[role] for role in roles if role in maps]
            stored = lay_out(modules, self._pages)
            if stored is not None:
                found[roles[0] == "query"] = native_matrix(stored)
        return found

    def _norm(self, norm: nn.Module) -> tuple[int, int, float]:
        operands = norm_operands(norm)
        assert operands is not None  # see `_is_unknown`
        return self._address(operands.weight), self._address(operands.bias), operands.epsilon

    def _set_map(self, layer: Any, layer_idx: int, map_idx: int, role: MapRole, module: AnyPrecisionLinear) -> None:
        mean, bias, rule = None, module.bias, self._plan.bits
        centre = self._plan.layers[layer_idx].centres.get(id(module))
        if centre is not None:
            mean, product = centre.bind(module.channel_norms)
            bias = product if bias is None else bias + product
        num_maps = len(self._layers[0].quantized)
        chosen = KernelBits((MAX_BITS,)) if rule is None else guarded(rule.kernel_bits, layer_idx, map_idx, num_maps)
        assert chosen is not None  # see `unsupported_reason`
        matrix = module.matrix
        self._kept += [matrix, *module.buffers()]
        layer.set_map(role, matrix, self._address(bias), self._address(mean), chosen.bits[0], module.channel_bytes)
        if chosen.thresholds:
            norms = self._address(module.channel_norms)
            layer.grade_map(role, list(chosen.thresholds), list(chosen.bits), norms)

    def _set_shortcut(self, layer: Any, shortcut: BoundShortcut) -> None:
        weights = shortcut.fitted.weights
        down, up = (None, weights[0]) if len(weights) == 1 else weights
        layer.set_shortcut(
            shortcut.shortcut.part == "attention",
            self._address(down),
            self._address(up),
            self._address(shortcut.fitted.bias),
            0 if down is None else down.shape[1],
            self._address(shortcut.gate),
            0.0 if shortcut.shortcut.threshold is None else math.log(shortcut.shortcut.threshold),
        )

    def _address(self, tensor: Tensor | None) -> int:
        """Return where a tensor's values lie, contiguous, 0 for none; it is kept."""
        if tensor is None:
            return 0
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _fields(layout: RaggedLayout, halted: Tensor | None, state: State, context: PassContext) -> list[int]:
    """Return for each row: sequence, place among its sequence's new entries, position, flags, bits at most."""
    marks = iter(_marks(layout, halted, state, context))
    positions = iter(layout.positions.tolist())
    fields: list[int] = []
    for sequence, length in enumerate(layout.lengths):
        for offset in range(length):
            fields += (sequence, offset, next(positions), *next(marks))
    return fields


def _marks(
    layout: RaggedLayout, halted: Tensor | None, state: State, context: PassContext
) -> list[tuple[bool, bool, bool, int]]:
    """Return for each row whether it has halted, reads all bits, and runs all sublayers, and its bits at most."""
    bits, shortcuts, most = context.protected.bits, context.protected.shortcuts, state.max_bits
    if halted is None and bits is None and shortcuts is None and most is None:
        return [(False, False, False, MAX_BITS)] * sum(layout.lengths)
    stopped = set() if halted is None else set(halted.tolist())
    bits, shortcuts, most = (None if tensor is None else tensor.tolist() for tensor in (bits, shortcuts, most))
    return [
        (
            origin in stopped,
            bits is not None and bits[origin],
            shortcuts is not None and shortcuts[origin],
            MAX_BITS if most is None else most[origin],
        )
        for origin in layout.origin.tolist()
    ]


def _is_unknown(layer: LayerOps) -> bool:
    return activation_name(layer.activation) is None or None in map(norm_operands, layer.norms.values())


def span_ends(num_layers: int, asked: Collection[int]) -> list[int]:
    """Return for each layer up to where a span that begins with it goes; a layer that is asked about is a span."""
    ends, end = [0] * num_layers, num_layers
    for layer_idx in reversed(range(num_layers)):
        if layer_idx in asked:
            ends[layer_idx], end = layer_idx + 1, layer_idx
        else:
            ends[layer_idx] = end
    return ends
