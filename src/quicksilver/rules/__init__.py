"""Configuration of each mechanism as frozen dataclasses.

Rules of halting and fusion decide themselves, and other packages can bring some; what the other configurations decide
is in `quicksilver.policies`.
"""

from quicksilver.core.decisions import FusionDecision, HaltDecision, LayerView, PairView
from quicksilver.rules.attention import AttentionConfig
from quicksilver.rules.checks import Threshold, threshold_at
from quicksilver.rules.entries import EntryConfig
from quicksilver.rules.fusion import (
    CosineFusionRule,
    ForcedFusionRule,
    FusionConfig,
    FusionRule,
    FusionScope,
    FusionWeights,
    L2FusionRule,
    RandomFusionRule,
    SimilarityRule,
    fusion_rule,
)
from quicksilver.rules.halting import (
    AllRule,
    DriftRule,
    EntropyRule,
    FittedRule,
    FixedPointRule,
    ForcedRule,
    HaltingConfig,
    HaltingRule,
    RandomRule,
    RelativeDriftRule,
    ThresholdRule,
    halting_rule,
)
from quicksilver.rules.kv import DropFill, KVFill, PropagateFill, ZeroFill
from quicksilver.rules.maps import MapConfig, Shortcut, ShortcutConfig
from quicksilver.rules.precision import (
    ChannelWidthRule,
    EntropyWidthRule,
    GradedWidthRule,
    PrecisionConfig,
    PrecisionRule,
    UniformWidthRule,
)
from quicksilver.rules.screening import ScreeningConfig

__all__ = [
    "AllRule",
    "AttentionConfig",
    "ChannelWidthRule",
    "CosineFusionRule",
    "DriftRule",
    "DropFill",
    "EntropyRule",
    "EntropyWidthRule",
    "EntryConfig",
    "FittedRule",
    "FixedPointRule",
    "ForcedFusionRule",
    "ForcedRule",
    "FusionConfig",
    "FusionDecision",
    "FusionRule",
    "FusionScope",
    "FusionWeights",
    "GradedWidthRule",
    "HaltDecision",
    "HaltingConfig",
    "HaltingRule",
    "KVFill",
    "L2FusionRule",
    "LayerView",
    "MapConfig",
    "PairView",
    "PrecisionConfig",
    "PrecisionRule",
    "PropagateFill",
    "RandomFusionRule",
    "RandomRule",
    "RelativeDriftRule",
    "ScreeningConfig",
    "Shortcut",
    "ShortcutConfig",
    "SimilarityRule",
    "Threshold",
    "ThresholdRule",
    "UniformWidthRule",
    "ZeroFill",
    "fusion_rule",
    "halting_rule",
    "threshold_at",
]
