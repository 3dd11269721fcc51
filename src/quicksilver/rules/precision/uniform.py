"""The same bits of every weight."""

from dataclasses import dataclass

from quicksilver.core.decisions import BitsChoice, ChannelView, KernelBits
from quicksilver.rules.precision.base import PrecisionRule, check_bits, precision_rule


@precision_rule("uniform")
@dataclass(frozen=True)
class UniformBitsRule(PrecisionRule):
    """Every weight is read at `bits` bits."""

    bits: int

    def __post_init__(self) -> None:
        check_bits("UniformBitsRule: bits", self.bits)

    def decide(self, view: ChannelView) -> BitsChoice:
        return BitsChoice(self.bits)

    def kernel_bits(self, layer_idx: int, map_idx: int, num_maps: int) -> KernelBits:
        return KernelBits((self.bits,))
