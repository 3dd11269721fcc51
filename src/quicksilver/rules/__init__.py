"""Rules of each mechanism: a rule owns its name, what it needs to see, its decision, and what that costs.

Other packages can bring rules of every kind; the configurations that hold them are the four parts of a plan.
"""

from quicksilver.core.decisions import (
    BitsChoice,
    ChannelView,
    Fill,
    FusionDecision,
    HaltDecision,
    KernelBits,
    LayerView,
    PairView,
    TokenBitsView,
)
from quicksilver.rules.checks import Threshold, threshold_at
from quicksilver.rules.controls import ForcedFusionRule, ForcedRule, RandomFusionRule, RandomRule
from quicksilver.rules.fusion.base import FusionRule, SimilarityRule, fusion_rule
from quicksilver.rules.fusion.config import FusionConfig, FusionScope, FusionWeights
from quicksilver.rules.fusion.cosine import CosineFusionRule
from quicksilver.rules.halting.all_of import AllRule
from quicksilver.rules.halting.base import HaltingRule, ThresholdRule, halting_rule
from quicksilver.rules.halting.config import HaltingConfig
from quicksilver.rules.halting.entropy import EntropyRule
from quicksilver.rules.halting.fitted import FittedRule
from quicksilver.rules.halting.shortcuts import Part, Shortcut
from quicksilver.rules.halting.updates import FixedPointRule, RelativeDriftRule
from quicksilver.rules.kv.base import DropFill, FillRule, PropagateFill, fill_rule
from quicksilver.rules.kv.config import KVConfig
from quicksilver.rules.paper import DriftRule, EntropyBitsRule, L2FusionRule, ZeroFill
from quicksilver.rules.precision.base import PrecisionRule, precision_rule
from quicksilver.rules.precision.channel import ChannelBitsRule
from quicksilver.rules.precision.config import PrecisionConfig
from quicksilver.rules.precision.graded import GradedBitsRule
from quicksilver.rules.precision.uniform import UniformBitsRule

__all__ = [
    "AllRule",
    "BitsChoice",
    "ChannelBitsRule",
    "ChannelView",
    "CosineFusionRule",
    "DriftRule",
    "DropFill",
    "EntropyBitsRule",
    "EntropyRule",
    "Fill",
    "FillRule",
    "FittedRule",
    "FixedPointRule",
    "ForcedFusionRule",
    "ForcedRule",
    "FusionConfig",
    "FusionDecision",
    "FusionRule",
    "FusionScope",
    "FusionWeights",
    "GradedBitsRule",
    "HaltDecision",
    "HaltingConfig",
    "HaltingRule",
    "KVConfig",
    "KernelBits",
    "L2FusionRule",
    "LayerView",
    "PairView",
    "Part",
    "PrecisionConfig",
    "PrecisionRule",
    "PropagateFill",
    "RandomFusionRule",
    "RandomRule",
    "RelativeDriftRule",
    "Shortcut",
    "SimilarityRule",
    "Threshold",
    "ThresholdRule",
    "TokenBitsView",
    "UniformBitsRule",
    "ZeroFill",
    "fill_rule",
    "fusion_rule",
    "halting_rule",
    "precision_rule",
    "threshold_at",
]
