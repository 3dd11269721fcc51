"""From what was fitted and measured to plans: one price for a unit of work, and how each mechanism departs from it.

A saving is taken where what it is predicted to cost, in nats, is below its price: at the optimum a unit of work is
worth the same everywhere (the Lagrangian of rate and distortion; Shoham and Gersho 1988). Predictions are first-order
and the mechanisms disturb one another, so the search gives each mechanism a factor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from quicksilver.calibrate.bits import MapScores, thresholds
from quicksilver.calibrate.mechanisms import Mechanism
from quicksilver.calibrate.objectives import UnitCosts
from quicksilver.calibrate.sensitivity import AttentionPrices
from quicksilver.calibrate.shortcuts import Unit
from quicksilver.families.spec import MLP, QUERY, ModelSpec
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import (
    ChannelBitsRule,
    CosineFusionRule,
    DropFill,
    FittedRule,
    ForcedRule,
    FusionConfig,
    HaltingConfig,
    KVConfig,
    PrecisionConfig,
    PropagateFill,
    Shortcut,
)

FILLS = {"propagate": PropagateFill(), "drop": DropFill()}


@dataclass(frozen=True)
class Candidate:
    """A candidate before it is a plan."""

    nats_per_work: float  # nats that the whole of a dense token's work is worth
    # for each mechanism that is on, what its price is multiplied by; for fusion, the cosine instead; for entries, which
    # have no price, anything
    factors: Mapping[Mechanism, float]
    fill: str = "propagate"  # what a halted token leaves in deeper layers

    def without(self, mechanism: Mechanism) -> Candidate:
        """Return the candidate with a mechanism off."""
        return replace(self, factors={name: each for name, each in self.factors.items() if name != mechanism})


@dataclass
class CalibrationData:
    """All that is known of a model before the search."""

    spec: ModelSpec  # of the model that runs the plans
    units: UnitCosts  # what units of work are of a dense token's
    context: int = 0  # tokens of the longest window
    tensors: dict[str, Tensor] = field(default_factory=dict)  # fitted maps and gates, under a plan's names
    # layers after which tokens may halt, contiguous up to the last but one; empty for none
    halt_layers: tuple[int, ...] = ()
    # for each sublayer the nats that one unit of its map's relative error costs, and the mean nats where every token
    # takes it
    shortcuts: dict[Unit, tuple[float, float]] = field(default_factory=dict)
    map_scores: list[MapScores] = field(default_factory=list)  # of the quantized maps; empty for plain weights
    # for each of them the nats that one unit of its relative error costs
    map_weights: list[float] = field(default_factory=list)
    centred: bool = False  # channels that are left out stand at their mean
    attention: AttentionPrices = field(default_factory=AttentionPrices)  # prices of leaving keys and values out
    entry_nats: float = 0.0  # what keeping keys and values as codes costs


def build(candidate: Candidate, data: CalibrationData, name: str, bits: tuple[int, ...]) -> Plan:
    """Return the plan of a candidate, whose channels may be read at `bits`."""
    halting: dict[str, Any] = {}
    kv: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    product = data.units.entry if "entries" in candidate.factors else data.units.pair
    for mechanism, factor in candidate.factors.items():
        nats_per_work = candidate.nats_per_work * factor
        if mechanism == "halting" and data.halt_layers:
            halting |= _halting(nats_per_work, data)
            kv["fill"] = FILLS[candidate.fill]
        elif mechanism == "shortcuts":
            halting["shortcuts"] = shortcuts_at(nats_per_work, data)
        elif mechanism == "skipping":
            limits = data.attention.thresholds(nats_per_work * product)
            kv["skip_below"] = limits if any(limits) else 0.0
        elif mechanism == "entries":
            kv["bits"] = 8
        elif mechanism == "fusion":
            parts["fusion"] = FusionConfig(CosineFusionRule(factor))
        elif mechanism == "channels":
            parts["precision"] = _channels(nats_per_work, data, bits)
    if any(halting.values()):
        parts["halting"] = HaltingConfig(**halting)
    plan = Plan(name, kv=KVConfig(**kv), **parts)
    tensors = {key: tensor for key, tensor in data.tensors.items() if key.startswith(prefixes(plan, data))}
    return replace(plan, tensors=PlanTensors(tensors)) if tensors else plan


def prefixes(plan: Plan, data: CalibrationData) -> tuple[str, ...]:
    """Return what the names of the tensors begin with that a plan uses."""
    names = [f"{shortcut.name}." for shortcut in plan.shortcuts]
    if plan.halting is not None and plan.halting.rule is not None:
        names += [f"{kind}.{i}." for i in data.halt_layers for kind in ("output", "gate")]
    if plan.precision is not None and data.centred:
        names.append("mean.")
    return tuple(names)


def static_exit(layer_idx: int, data: CalibrationData) -> Plan:
    """Return the plan under which every token halts after one layer, and predicts through its map."""
    depth = layer_idx + 1
    rule = ForcedRule((depth,))
    config = HaltingConfig(rule, min_layer=depth, protect_first=0, protect_special=False, output_maps=True)
    tensors = {key: tensor for key, tensor in data.tensors.items() if key.startswith("output.")}
    return Plan(f"exit-{depth}", config, KVConfig(PropagateFill()), tensors=PlanTensors(tensors))


def shortcuts_at(nats_per_work: float, data: CalibrationData) -> tuple[Shortcut, ...]:
    """Return the shortcuts whose gates let tokens skip at a price; none where nobody would."""
    taken = []
    for (layer_idx, part), (weight, nats) in sorted(data.shortcuts.items()):
        limit = nats_per_work * _unit_work((layer_idx, part), data)
        if nats < _HOPE * limit:
            taken.append(Shortcut(layer_idx, part, limit / max(weight, 1e-30)))
    return tuple(taken)


_HOPE = 8.0  # where all tokens together lose more than this many times what they may, the gate would let too few past


def _unit_work(unit: Unit, data: CalibrationData) -> float:
    """Return what a sublayer does for a token beyond its map, as a share of the dense model's work."""
    spec, layer_idx, part = data.spec, *unit
    layer = spec.layers[layer_idx]
    name = f"shortcut.{layer_idx}.{part}"
    of_map = sum(t.numel() for key, t in data.tensors.items() if key.startswith(name) and t.dim() == 2)
    weight, fitted = data.units.weight(spec.weight_bits), data.units.weight(8 * spec.dtype.itemsize)
    if part == "mlp":
        return layer.macs_of(*MLP) * weight - of_map * fitted
    seen = data.context / 4 if layer.window is None else min(data.context / 4, layer.window)
    pairs = seen * spec.attention_macs_per_pair  # about; values that are not read already left out
    return layer.macs_of(*QUERY) * weight + pairs * data.units.pair - of_map * fitted


def _halting(nats_per_work: float, data: CalibrationData) -> dict[str, Any]:
    layers = data.spec.num_layers
    limits = tuple(
        nats_per_work * (layers - 1 - i) * data.units.layer if i in data.halt_layers else 0.0 for i in range(layers)
    )
    return {"rule": FittedRule(limits), "min_layer": data.halt_layers[0] + 1, "output_maps": True}


def _channels(nats_per_work: float, data: CalibrationData, bits: tuple[int, ...]) -> PrecisionConfig:
    """Return channels' bits at a price, a set of thresholds for each map."""
    limits = tuple(
        thresholds(scores, bits, nats_per_work * data.units.bit, nats_per_work * data.units.mac, weight)
        for scores, weight in zip(data.map_scores, data.map_weights, strict=True)
    )
    return PrecisionConfig(ChannelBitsRule(limits, bits, centred=data.centred))
