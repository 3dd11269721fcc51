"""Hypothesis strategies for plans under which the tiny models' tokens halt, fuse and skip sublayers, of every rule."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from hypothesis import strategies as st

from quicksilver import rules
from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import Part
from quicksilver.rules.paper import EntropyOf
from tests import tiny
from tests.engines import skipping_plan, with_kv, with_maps
from tests.tiny import NUM_LAYERS


def _thresholds(low: float, high: float) -> st.SearchStrategy[rules.Threshold]:
    number = st.floats(low, high)
    return st.one_of(number, st.tuples(*[number] * NUM_LAYERS))


simple_rules: st.SearchStrategy[rules.HaltingRule] = st.one_of(
    st.builds(rules.DriftRule, _thresholds(8.0, 20.0)),
    st.builds(rules.RelativeDriftRule, _thresholds(0.4, 1.1)),
    st.builds(rules.FixedPointRule, _thresholds(0.5, 1.2), min_cosine=st.floats(-1.0, 0.1)),
    st.builds(
        rules.EntropyRule,
        _thresholds(6.0, 8.0),
        layers=st.none() | st.lists(st.integers(0, NUM_LAYERS - 1), max_size=3).map(tuple),
    ),
    st.builds(rules.FittedRule, _thresholds(0.2, 5.0)),
    st.builds(rules.RandomRule, st.floats(0.0, 1.0), seed=st.integers(0, 1000)),
    st.builds(rules.ForcedRule, st.lists(st.integers(1, NUM_LAYERS + 1), min_size=1, max_size=7).map(tuple)),
)
halting_rules = st.one_of(
    simple_rules,
    st.builds(rules.AllRule, st.lists(simple_rules, min_size=1, max_size=3).map(tuple)),
)
fills: st.SearchStrategy[rules.KVConfig] = st.sampled_from(
    [rules.KVConfig(), rules.KVConfig(rules.ZeroFill()), rules.KVConfig(rules.PropagateFill())]
)
halting_configs = st.builds(
    rules.HaltingConfig,
    halting_rules,
    min_layer=st.one_of(st.integers(1, NUM_LAYERS), st.sampled_from([0.25, 0.5, 0.75])),
    protect_first=st.integers(0, 3),
    protect_special=st.booleans(),
)
fusion_rules: st.SearchStrategy[rules.FusionRule] = st.one_of(
    st.builds(rules.L2FusionRule, st.floats(10.0, 30.0)),
    st.builds(rules.CosineFusionRule, st.floats(-0.2, 0.6)),
    st.builds(rules.RandomFusionRule, st.floats(0.0, 1.0), seed=st.integers(0, 1000)),
    st.builds(rules.ForcedFusionRule, st.lists(st.booleans(), min_size=1, max_size=7).map(tuple)),
)
_fusion_layers = st.lists(st.integers(1, NUM_LAYERS - 1), min_size=1, max_size=3, unique=True).map(
    lambda layers: tuple(sorted(layers))
)
_fusion_places = st.tuples(_fusion_layers, st.sampled_from(get_args(rules.FusionScope))).map(
    lambda place: {"layers": place[0], "scope": place[1] if len(place[0]) == 1 else "prompt"}
)
fusion_configs = st.builds(
    lambda rule, places, options: rules.FusionConfig(rule, **places, **options),
    fusion_rules,
    _fusion_places,
    st.fixed_dictionaries(
        {
            "max_group": st.integers(2, 6),
            "weights": st.sampled_from(get_args(rules.FusionWeights)),
            "protect_first": st.integers(0, 3),
            "protect_special": st.booleans(),
        }
    ),
)
_shortcuts = st.builds(
    rules.Shortcut,
    st.integers(0, NUM_LAYERS - 1),
    st.sampled_from(get_args(Part)),
    st.none() | st.floats(0.3, 3.0),
)
shortcut_parts = st.fixed_dictionaries(
    {
        "shortcuts": st.lists(_shortcuts, min_size=1, max_size=5, unique_by=lambda shortcut: shortcut.name).map(tuple),
        "shortcuts_protect_first": st.integers(0, 3),
        "shortcuts_protect_special": st.booleans(),
    }
)


def _maybe_with_shortcuts(drawn: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    tensors = st.builds(tiny.shortcut_tensors, st.integers(0, 3), st.sampled_from((None, 3)))
    return drawn | st.builds(
        lambda plan, parts, fitted: replace(
            plan,
            halting=rules.HaltingConfig(**parts) if plan.halting is None else replace(plan.halting, **parts),
            tensors=PlanTensors({**(plan.tensors or {}), **fitted}),
        ),
        drawn,
        shortcut_parts,
        tensors,
    )


_fitted = st.builds(
    tiny.fitted,
    st.integers(0, 3),
    st.sampled_from([None, 1, 8]),
    gates=st.sampled_from([(0, 1, 2), (1, 2), (2,)]),
)


def _with_fitted(drawn: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    """Give plans output maps, or not, and to those that refer to fitted tensors the tensors."""

    def complete(plan: Plan, maps: bool, tensors: PlanTensors) -> Plan:
        if maps:
            return with_maps(plan, tensors)
        rule = None if plan.halting is None else plan.halting.rule
        return replace(plan, tensors=tensors) if rule is not None and rule.reads_gates else plan

    return st.builds(complete, drawn, st.booleans(), _fitted)


plans = _maybe_with_shortcuts(_with_fitted(st.builds(Plan, st.just("random"), st.none() | halting_configs, fills)))
fusing_plans = _maybe_with_shortcuts(
    _with_fitted(st.builds(Plan, st.just("random"), st.none() | halting_configs, fills, fusion_configs))
)

skipping_plans = _with_fitted(
    st.builds(
        lambda plan, threshold, large: skipping_plan(threshold, plan, large),
        st.builds(Plan, st.just("random"), st.none() | halting_configs, fills, st.none() | fusion_configs),
        st.just(0.0) | _thresholds(0.0, 1.0),
        st.floats(0.0, 2.0),
    )
)
"""Run these in float64: in float32 what is near its threshold may fall on either side of it, in float64 hardly."""

coded_plans = st.builds(
    lambda plan, bits: with_kv(plan, bits=bits),
    st.one_of(plans, fusing_plans, skipping_plans),
    st.sampled_from([8, 16]),
)
"""These too: what is near the middle between two codes may be rounded to either."""


def _graded(**options: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """BitsChoice, and as many descending thresholds as they need, for scores of a few units."""
    chosen_bits = options.pop("bits")
    return chosen_bits.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {
                "bits": st.just(chosen),
                "thresholds": st.lists(st.floats(0.0, 8.0), min_size=len(chosen) - 1, max_size=len(chosen) - 1).map(
                    lambda limits: tuple(sorted(limits, reverse=True))
                ),
                **options,
            }
        )
    )


def _bits_read(*more: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.sampled_from((*more, *WEIGHT_BITS)), min_size=2, max_size=5).map(
        lambda found: tuple(sorted(found, reverse=True))
    )


channel_rules = _graded(bits=_bits_read(0)).map(lambda values: rules.ChannelBitsRule(**values))
entropy_bits_rules = _graded(
    bits=_bits_read(), over=st.sampled_from(get_args(EntropyOf)), layer=st.sampled_from([1, 2, 0.5])
).map(lambda values: rules.EntropyBitsRule(**values))
precision_configs = st.builds(
    rules.PrecisionConfig,
    st.one_of(
        st.builds(rules.UniformBitsRule, st.sampled_from(WEIGHT_BITS)),
        channel_rules,
        entropy_bits_rules,
    ),
    protect_first=st.integers(0, 3),
    protect_special=st.booleans(),
)
precise_plans = _maybe_with_shortcuts(
    _with_fitted(st.builds(Plan, st.just("random"), st.none() | halting_configs, fills, st.none(), precision_configs))
)
