"""Spans of whole layers by the native kernels, where nobody need be asked between two layers.

What a layer is, is `block.py`'s; this makes the same happen in one call, for rows of a nested model on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.cache import extend
from quicksilver.core.bits import MAX_WIDTH
from quicksilver.core.decisions import Fill
from quicksilver.core.ragged import TokenState
from quicksilver.families.kernels import activation_name, norm_operands
from quicksilver.families.spec import Adapter, LayerOps, Leaves, MapRole
from quicksilver.ops import native
from quicksilver.ops.nested_linear import has_whole_levels, prepared
from quicksilver.plan import Plan
from quicksilver.policies import kv, precision
from quicksilver.quant import NestedLinear
from quicksilver.rules import UniformWidthRule
from quicksilver.runtime.context import PassContext
from quicksilver.runtime.kernel_counts import KernelCounts
from quicksilver.runtime.precision import PrecisionStep
from quicksilver.runtime.shortcuts import ShortcutStep
from quicksilver.runtime.status import Running, TokenStatus


class LayerSpans:
    """A model's layers and a plan's rules as the kernels see them.

    Args:
        adapter: the model.
        plan: the plan.
        precision_step: holds the means of maps' inputs.
        shortcut_step: holds fitted maps and gates.
        asked: layers after which a policy must be asked; each is a span of its own.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        precision_step: PrecisionStep,
        shortcut_step: ShortcutStep,
        asked: Collection[int],
    ) -> None:
        spec = adapter.spec
        self._plan, self._spec, self._layers = plan, spec, adapter.layers
        self._precision, self._shortcuts = precision_step, shortcut_step
        self._fill = kv.decide(plan.kv, 0).fill
        self._plain_head = adapter.normed_head is None  # PyTorch's threads multiply it next
        self._key = object()  # of its counts in a trace, which does not keep these spans
        self._kept: list[Any] = []  # what the kernels hold addresses of
        self._ends = span_ends(spec.num_layers, asked)
        self._runner: Any = None

    @staticmethod
    def obstacle(adapter: Adapter, plan: Plan) -> str | None:
        """Return why the kernels cannot run a model's layers under a plan, None where they can."""
        if adapter.kernels != "native":
            return "the kernels do not read its weights"
        if any(_unknown(layer.leaves) for layer in adapter.layers):
            return "it has norms or an activation that the kernels do not know"
        if not all(has_whole_levels(module.stored) for layer in adapter.layers for module in layer.nested):
            return "levels of its narrow widths are not whole codes"
        return None

    def span(self, first: int, running: Running, status: TokenStatus, context: PassContext) -> range | None:
        """Return the layers that the kernels can run from layer `first` on, None where they cannot run it."""
        merged = running.state.mass is not None or status.masses is not None
        if (
            self._layers[0].nested[0].is_expanded
            or merged
            or status.present is not context.chunk
            or any(context.fuses)
            or not self._reads(running)
        ):
            return None
        if status.halted is not None and self._fill not in (Fill.NONE, Fill.PROJECT):
            return None
        return range(first, self._ends[first])

    def _reads(self, running: Running) -> bool:
        """Whether states and rotations are what the kernels take them for, whatever has become of the model."""
        hidden, rotation = running.state.hidden, running.rotation
        fit = hidden.dtype == torch.float32 and hidden.is_cpu and hidden.shape[1] == self._spec.hidden_size
        if rotation is None or not fit:
            return fit
        return rotation.cos.dtype == torch.float32 and rotation.cos.shape[-1] == self._spec.head_dim

    def run(self, layers: range, running: Running, status: TokenStatus, context: PassContext) -> Running:
        """Run layers for the running tokens, write their entries, count; as `run_layer` does one by one.

        Where halted tokens' keys and values are projected, their states go along and leave as they came.
        """
        halted = status.halted if self._fill is Fill.PROJECT else None
        layout = running.state.layout if halted is None else context.chunk
        hidden = self._rows(running, status, halted)
        fields = self._fields(layout, halted, status, context)
        storage = extend(context.caches, layers, layout.lengths)
        rotation = running.rotation if halted is None else context.rotation
        cos, sin = (0, 0) if rotation is None else (rotation.cos.data_ptr(), rotation.sin.data_ptr())
        counts = context.trace.pending(self._key, self._new_counts)
        if self._runner is None:  # not before it is needed: it takes as much memory as the weights
            self._runner = self._new_runner()
        self._runner.run(
            layers.start,
            layers.stop,
            hidden.data_ptr(),
            len(hidden),
            fields,
            cos,
            sin,
            storage,
            len(layout.lengths),
            counts.address(layers.start),
            torch.get_num_threads(),
            self._plain_head and layers.stop == self._spec.num_layers,
        )
        if halted is not None:
            hidden = hidden.index_select(0, running.state.layout.origin)
        return Running(TokenState(hidden, running.state.layout), running.rotation)

    @staticmethod
    def _rows(running: Running, status: TokenStatus, halted: Tensor | None) -> Tensor:
        """Return the states of all rows of a run, a tensor of their own."""
        hidden = running.state.hidden
        if halted is None or status.frozen is None:
            return hidden.clone(memory_format=torch.contiguous_format)
        return running.state.scatter_into(status.frozen.clone())

    @staticmethod
    def _fields(layout: Any, halted: Tensor | None, status: TokenStatus, context: PassContext) -> list[int]:
        """Return for each row: sequence, place among its sequence's new entries, position, flags, bits at most."""
        marks = iter(LayerSpans._marks(layout, halted, status, context))
        positions = iter(layout.positions.tolist())
        fields: list[int] = []
        for sequence, length in enumerate(layout.lengths):
            for offset in range(length):
                fields += (sequence, offset, next(positions), *next(marks))
        return fields

    @staticmethod
    def _marks(
        layout: Any, halted: Tensor | None, status: TokenStatus, context: PassContext
    ) -> list[tuple[bool, bool, bool, int]]:
        """Return for each row whether it has halted, reads all bits, and runs all sublayers, and its bits at most."""
        given = context.exempt, context.unshortened, status.caps
        if halted is None and all(tensor is None for tensor in given):
            return [(False, False, False, MAX_WIDTH)] * layout.num_tokens
        stopped = set() if halted is None else set(halted.tolist())
        exempt, unshortened, caps = (None if tensor is None else tensor.tolist() for tensor in given)
        return [
            (
                origin in stopped,
                exempt is not None and exempt[origin],
                unshortened is not None and unshortened[origin],
                MAX_WIDTH if caps is None else caps[origin],
            )
            for origin in layout.origin.tolist()
        ]

    def _new_runner(self) -> Any:
        spec, leaves, down = self._spec, self._layers[0].leaves, self._layers[0].nested[-1]
        return native.extension().LayerRunner(
            [self._layer(i, layer) for i, layer in enumerate(self._layers)],
            spec.hidden_size,
            down.num_inputs,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            activation_name(leaves.activation),
            self._plan.entry_bits or 8 * torch.float32.itemsize,
        )

    def _new_counts(self) -> KernelCounts:
        return KernelCounts(self._spec, self._plan, self._layers, self._precision, self._shortcuts)

    def _layer(self, layer_idx: int, ops: LayerOps) -> Any:
        layer, leaves = native.extension().Layer(), ops.leaves
        for name, norm in leaves.norms.items():
            layer.set_norm(name, *self._norm(norm))
        for map_idx, (role, module) in enumerate(zip(leaves.roles, ops.nested, strict=True)):
            self._set_map(layer, layer_idx, map_idx, role, module)
        for part in ("attention", "mlp"):
            self._set_shortcut(layer, layer_idx, part)
        attention, screening = self._plan.attention, self._plan.screening
        layer.set_attention(
            ops.scaling,
            0.0 if attention is None else attention.threshold_in(layer_idx),
            0.0 if attention is None else attention.query_threshold_in(layer_idx),
            0.0 if screening is None else screening.threshold_in(layer_idx),
            0.0 if screening is None else screening.query_threshold_in(layer_idx),
        )
        return layer

    def _norm(self, norm: nn.Module) -> tuple[int, int, float]:
        operands = norm_operands(norm)
        assert operands is not None  # see `_unknown`
        return self._address(operands.weight), self._address(operands.bias), operands.epsilon

    def _set_map(self, layer: Any, layer_idx: int, map_idx: int, role: MapRole, module: NestedLinear) -> None:
        mean, bias = None, module.bias
        centre = self._precision.centre(module)
        if centre is not None:
            mean, product = centre.bind(module.channel_norms)
            bias = product if bias is None else bias + product
        rule = None if self._plan.precision is None else self._plan.precision.rule
        channels = precision.channel_rule(rule)
        matrix = prepared(module.stored, by_channel=channels is not None)
        self._kept.append(matrix)
        width = rule.width if isinstance(rule, UniformWidthRule) else MAX_WIDTH
        layer.set_map(role, matrix, self._address(bias), self._address(mean), width)
        if channels is not None:
            thresholds = channels.thresholds_at(layer_idx, map_idx, len(self._layers[0].nested))
            layer.grade_map(role, list(thresholds), list(channels.widths), self._address(module.channel_norms))

    def _set_shortcut(self, layer: Any, layer_idx: int, part: Any) -> None:
        bound = self._shortcuts.bound(layer_idx, part)
        if bound is None:
            return
        weights = bound.fitted.weights
        down, up = (None, weights[0]) if len(weights) == 1 else weights
        rank = 0 if down is None else down.shape[1]
        layer.set_shortcut(
            part == "attention",
            self._address(down),
            self._address(up),
            self._address(bound.fitted.bias),
            rank,
            self._address(bound.gate),
            0.0 if bound.threshold is None else math.log(bound.threshold),
        )

    def _address(self, tensor: Tensor | None) -> int:
        """Return where a tensor's values lie, contiguous, 0 for none; it is kept."""
        if tensor is None:
            return 0
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _unknown(leaves: Leaves) -> bool:
    known = all(norm_operands(norm) is not None for norm in leaves.norms.values())
    return not known or activation_name(leaves.activation) is None


def span_ends(num_layers: int, asked: Collection[int]) -> list[int]:
    """Return for each layer up to where a span that begins with it goes; a layer that is asked about is a span."""
    ends, end = [0] * num_layers, num_layers
    for layer_idx in reversed(range(num_layers)):
        if layer_idx in asked:
            ends[layer_idx], end = layer_idx + 1, layer_idx
        else:
            ends[layer_idx] = end
    return ends
