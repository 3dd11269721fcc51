"""A plan as it applies to each layer of a model: numbers, fills, maps and gates, on the model's device.

Both backends read this and nothing else of a plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quicksilver.core.decisions import Fill
from quicksilver.core.trace import COUNT, Trace
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.plan.affine import AffineMap
from quicksilver.plan.tensors import named_vector
from quicksilver.rules import Part, PrecisionRule, Shortcut, threshold_at
from quicksilver.rules.precision.base import mean_name
from quicksilver.weights import AnyPrecisionLinear

_SKIPPED: dict[Part, int] = {"mlp": COUNT["skipped_mlp"], "attention": COUNT["skipped_attention"]}


@dataclass(frozen=True)
class BoundShortcut:
    """A shortcut with its tensors on the model's device: the map in the model's dtype, the gate in float32 or wider."""

    shortcut: Shortcut
    fitted: AffineMap
    gate: Tensor | None

    def record(self, trace: Trace, layer_idx: int, skipped: int, asked: int) -> None:
        """Count `skipped` rows that took the shortcut and `asked` rows that its gate was asked about."""
        if self.gate is not None:
            size = self.fitted.bias.shape[0]  # of the state, whose norm is taken
            trace.record_fitted(layer_idx, asked, self.gate.numel() + size, self.gate.nbytes)
        trace.rows[layer_idx, _SKIPPED[self.shortcut.part]] += skipped
        trace.record_fitted(layer_idx, skipped, self.fitted.macs, self.fitted.nbytes)


class Centre:
    """The mean of one map's inputs, [in], and what the map gives for it, all bits read and without bias, [out]."""

    def __init__(self, module: AnyPrecisionLinear, mean: Tensor) -> None:
        self._module, self._mean = module, mean
        self._bound: tuple[Tensor, Tensor] | None = None

    def bind(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the device and in the dtype of the map's inputs."""
        if self._bound is None:
            mean = self._mean.to(like.device, like.dtype)
            product = self._module(mean[None])[0]
            self._bound = mean, product if self._module.bias is None else product - self._module.bias
        return self._bound


@dataclass(frozen=True)
class LayerPlan:
    """What a plan says of one layer."""

    fill: Fill  # what stands in the layer's cache for tokens that halted before it
    skip_below: float  # keys and values that weigh below this over n are left out; 0 for none
    estimate_dims_above: float  # magnitude of the components of a query that weights are estimated by
    attention: BoundShortcut | None  # the shortcut past attention, None where there is none
    mlp: BoundShortcut | None  # the shortcut past the MLP
    centres: Mapping[int, Centre]  # the means of its maps' inputs, by the map's identity
    key_centre: Tensor | None  # [num_kv_heads, head_dim] float32, what keys are kept less of; None for nothing


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan bound to a model."""

    layers: tuple[LayerPlan, ...]  # what it says of each
    bits: PrecisionRule | None  # the rule that chooses bits, None where all are read
    entry_bits: int | None  # in how many bits keys and values are kept, None for the model's own
    output_maps: Mapping[int, AffineMap]  # fitted maps of tokens that stop, by the layer after which they do
    gates: Mapping[int, Tensor]  # fitted gates of the halting rule, by layer

    @property
    def fills(self) -> bool:
        """Whether halted tokens leave entries in any layer that they skip."""
        return any(layer.fill is not Fill.NONE for layer in self.layers)


def resolve(plan: Plan, adapter: Adapter) -> ResolvedPlan:
    """Return what a plan says of each layer of a model; PlanError where they do not fit, or a tensor is missing."""
    spec = adapter.spec
    fitted = plan.check_model(spec.num_layers, len(adapter.layers[0].quantized), spec.hidden_size)
    maps = {name: each.to(spec.device, spec.dtype) for name, each in fitted.maps.items()}
    outputs = {i: f"output.{i}" for i in range(spec.num_layers - 1)}
    wide = torch.promote_types(spec.dtype, torch.float32)
    gates = {each: gate.to(spec.device, wide) for each, gate in fitted.shortcut_gates.items()}
    shortcuts: dict[tuple[int, Part], BoundShortcut] = {
        (each.layer, each.part): BoundShortcut(each, maps[each.name], gates.get(each)) for each in plan.shortcuts
    }
    return ResolvedPlan(
        layers=tuple(_layer(plan, adapter, layer_idx, shortcuts) for layer_idx in range(spec.num_layers)),
        bits=None if plan.precision is None else plan.precision.rule,
        entry_bits=plan.kv.bits,
        output_maps={i: maps[name] for i, name in outputs.items() if name in maps},
        gates={layer_idx: gate.to(spec.device) for layer_idx, gate in fitted.gates.items()},
    )


def _layer(
    plan: Plan, adapter: Adapter, layer_idx: int, shortcuts: Mapping[tuple[int, Part], BoundShortcut]
) -> LayerPlan:
    return LayerPlan(
        fill=plan.kv.fill.ask(layer_idx),
        skip_below=threshold_at(plan.kv.skip_below, layer_idx),
        estimate_dims_above=plan.kv.estimate_dims_above,
        attention=shortcuts.get((layer_idx, "attention")),
        mlp=shortcuts.get((layer_idx, "mlp")),
        centres=_centres(plan, adapter, layer_idx),
        key_centre=None if plan.kv.bits is None else adapter.key_centres[layer_idx],
    )


def _centres(plan: Plan, adapter: Adapter, layer_idx: int) -> dict[int, Centre]:
    """Return the means of the inputs of a layer's quantized maps, where the plan's rule subtracts them."""
    if plan.precision is None or not plan.precision.rule.reads_means:
        return {}
    centres = {}
    for map_idx, module in enumerate(adapter.layers[layer_idx].quantized):
        name = mean_name(layer_idx, map_idx)
        centres[id(module)] = Centre(module, named_vector(plan.tensors or {}, name, module.num_inputs))
    return centres
