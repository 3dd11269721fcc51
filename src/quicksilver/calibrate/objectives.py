"""What is to be saved, and what a unit of each kind of work is of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quicksilver.core.bits import ENTRY_BITS, MAX_BITS
from quicksilver.families.cost import Cost
from quicksilver.families.spec import ModelSpec

Objective = Literal["flops", "bitops", "weight_bytes", "kv_bytes", "seconds"]
OBJECTIVES: tuple[Objective, ...] = ("flops", "bitops", "weight_bytes", "kv_bytes", "seconds")


@dataclass(frozen=True)
class UnitCosts:
    """Units of work as shares of what the dense model spends on a token, by the measure that guides the search.

    Attributes:
        mac: of one multiply-add with a weight, whatever its bits.
        bit: of one bit of a weight read for one multiply-add.
        pair: of one multiply-add of two activations.
        entry: of one multiply-add of an activation and a cache entry kept as codes.
        layer: of one layer of the dense model.
    """

    mac: float
    bit: float
    pair: float
    entry: float
    layer: float

    def weight(self, bits: int = MAX_BITS) -> float:
        """Return what a multiply-add with a weight of so many bits is."""
        return self.mac + bits * self.bit


def unit_costs(objective: Objective, spec: ModelSpec, dense: Cost, tokens: int) -> UnitCosts:
    """Return what units of work are worth.

    Cache bytes and seconds have no such units: FLOPs guide the search, and what is wanted is measured.

    Args:
        objective: what is to be saved.
        spec: of the model that runs the plans.
        dense: what the dense model spends on `tokens` tokens.
        tokens: as many.
    """
    activation_bits, layer = 8 * spec.dtype.itemsize, spec.macs / spec.num_layers
    if objective == "bitops":
        total = dense.bitops / tokens
        bit, pair = activation_bits / total, activation_bits**2 / total
        return UnitCosts(0.0, bit, pair, ENTRY_BITS * bit, layer * spec.weight_bits * bit)
    if objective == "weight_bytes":
        total = dense.weight_bytes / tokens
        return UnitCosts(0.0, 1 / (8 * total), 0.0, 0.0, layer * spec.weight_bits / (8 * total))
    total = dense.flops / 2 / tokens
    return UnitCosts(1 / total, 0.0, 1 / total, 1 / total, layer / total)
