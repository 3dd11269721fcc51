"""What a precision rule is: it says how many bits of each weight are read, map by map and, if it likes, token by token.

A decision imports PyTorch when it is first made.
"""

from dataclasses import dataclass
from typing import ClassVar

from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.core.checks import is_whole
from quicksilver.core.decisions import BitsChoice, ChannelView, KernelBits, TokenBitsView
from quicksilver.errors import PlanError
from quicksilver.rules.registry import DecidingRule, RuleTypes
from quicksilver.rules.retired import refuse_retired


@dataclass(frozen=True)
class PrecisionRule(DecidingRule[ChannelView, BitsChoice]):
    """Base of the rules that choose bits, asked about each linear map's inputs."""

    is_fitted: ClassVar[bool] = True  # it can be run; else it says what its thresholds are to be fitted to
    reads_means: ClassVar[bool] = False  # `ChannelView.inputs` are less their means, the plan's tensors `mean_name`

    def after_layer(self, num_layers: int) -> int | None:
        """Index of the layer after which `decide_tokens` is asked, in a model of so many layers; None for never."""
        return None

    def decide_tokens(self, view: TokenBitsView) -> BitsChoice:
        """Return the most bits that tokens may read from here on, [N], which is then `ChannelView.max_bits`."""
        raise NotImplementedError

    def kernel_bits(self, layer_idx: int, map_idx: int, num_maps: int) -> KernelBits | None:
        """Return what compiled kernels may do in place of `decide` for one map of a layer; None for nothing."""
        return None

    def check_maps(self, num_layers: int, num_maps: int) -> None:
        """Raise PlanError where the rule does not fit a model of `num_layers` layers of `num_maps` linear maps."""


PRECISION_RULES: RuleTypes[PrecisionRule] = RuleTypes("precision rule", PrecisionRule)
precision_rule = PRECISION_RULES.register


def mean_name(layer_idx: int, map_idx: int) -> str:
    """Return the name of the tensor that holds the mean of a map's inputs, [in]."""
    return f"mean.{layer_idx}.{map_idx}"


def check_bits(what: str, bits: object, allowed: tuple[int, ...] = WEIGHT_BITS) -> None:
    """Raise PlanError where weights cannot be read at so many bits; `what` names them."""
    if is_whole(bits) and bits in allowed:
        return
    if is_whole(bits):
        refuse_retired("bits", bits, what.partition(":")[0])
    raise PlanError(f"{what} must be one of {', '.join(map(str, allowed))}, got {bits!r}")
