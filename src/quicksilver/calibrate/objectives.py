"""What is to be saved, and what a unit of each kind of work is of it."""

from dataclasses import dataclass

from quicksilver.calibrate.mechanisms import Objective
from quicksilver.core.bits import ENTRY_BITS, MAX_BITS
from quicksilver.families.cost import Cost
from quicksilver.families.spec import ModelSpec


@dataclass(frozen=True)
class UnitCosts:
    """Units of work as shares of what the dense model spends on a token, by the measure that guides the search."""

    mac: float  # of one multiply-add with a weight, whatever its bits
    bit: float  # of one bit of a weight read for one multiply-add
    pair: float  # of one multiply-add of two activations
    entry: float  # of one multiply-add of an activation and a cache entry kept as codes
    layer: float  # of one layer of the dense model

    def weight(self, bits: int = MAX_BITS) -> float:
        """Return what a multiply-add with a weight of so many bits is."""
        return self.mac + bits * self.bit


def unit_costs(objective: Objective, spec: ModelSpec, dense: Cost, tokens: int) -> UnitCosts:
    """Return what units of work are worth where the dense model spends so much on so many tokens.

    Cache bytes and seconds have no such units: FLOPs guide the search, and what is wanted is measured.
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
