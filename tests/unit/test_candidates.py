"""From prices to plans: thresholds grow with the price, a price of nothing saves nothing, units add up to the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig

from quicksilver.calibrate.candidates import CalibrationData, Candidate, build, shortcuts_at, static_exit
from quicksilver.calibrate.fitting import fit
from quicksilver.calibrate.objectives import Objective, UnitCosts, unit_costs
from quicksilver.core.trace import Trace
from quicksilver.families.cost import dense_cost, executed_cost
from quicksilver.families.registry import adapt
from quicksilver.families.spec import MLP
from quicksilver.plan import Plan
from quicksilver.rules import (
    ChannelBitsRule,
    CosineFusionRule,
    DropFill,
    FittedRule,
    PropagateFill,
    threshold_at,
)
from tests import tiny
from tests.engines import decoder, run_whole

ALL = ("halting", "shortcuts", "skipping", "channels")
BITS = (8, 4, 2, 0)
WINDOWS = [tiny.token_ids(60, seed=seed) for seed in range(4)]
PRICES = (1e-3, 0.1, 0.5, 2.0, 10.0, 50.0)


def dense_trace(model: Any) -> Trace:
    """Return what one window, its logits included, took the dense model."""
    return run_whole(decoder(model, Plan.dense()), WINDOWS[0]).trace


def units_of(model: Any, objective: Objective) -> UnitCosts:
    spec, trace = adapt(model).spec, dense_trace(model)
    return unit_costs(objective, spec, dense_cost(spec, trace), trace.tokens)


@pytest.fixture(scope="module")
def data() -> CalibrationData:
    model = tiny.quantized("llama")
    return fit(adapt(model), ALL, units_of(model, "flops"), WINDOWS, BITS)


def make(data: CalibrationData, nats_per_work: float, mechanisms: Sequence[Any] = ALL, **others: Any) -> Plan:
    return build(Candidate(nats_per_work, dict.fromkeys(mechanisms, 1.0), **others), data, "mine", BITS)


def flops(plan: Plan) -> int:
    spec = adapt(tiny.quantized("llama")).spec
    return executed_cost(spec, run_whole(decoder(tiny.quantized("llama"), plan), WINDOWS[1]).trace).flops


def test_limits_of_halting_grow_with_the_price_and_with_what_is_left_to_run(data: CalibrationData) -> None:
    limits = []
    for nats_per_work in PRICES:
        plan = make(data, nats_per_work, ["halting"])
        assert plan.halting is not None
        assert isinstance(plan.halting.rule, FittedRule)
        limits.append(plan.halting.rule.threshold)
        assert limits[-1][1] == pytest.approx(2 * limits[-1][2])  # twice the layers are saved
        assert limits[-1][0] == limits[-1][3] == 0.0
        assert limits[-1][2] == pytest.approx(nats_per_work * data.units.layer)
    assert limits == sorted(limits)


def test_limits_of_shortcuts_grow_with_the_price(data: CalibrationData) -> None:
    before: dict[str, float] = {}
    for nats_per_work in PRICES:
        found = {each.name: each.threshold or 0.0 for each in shortcuts_at(nats_per_work, data)}
        assert set(found) >= set(before)
        assert all(found[name] > before[name] for name in before)
        before = found
    assert len(before) == 2 * tiny.NUM_LAYERS
    assert shortcuts_at(1e-9, data) == ()


@pytest.mark.parametrize("objective", ["flops", "bitops", "weight_bytes"])
def test_limits_of_channels_grow_with_the_price(data: CalibrationData, objective: Objective) -> None:
    priced = replace(data, units=units_of(tiny.quantized("llama"), objective))
    limits = []
    for nats_per_work in PRICES:
        precision = make(priced, nats_per_work, ["channels"]).precision
        assert precision is not None
        assert isinstance(precision.rule, ChannelBitsRule)
        limits.append(torch.tensor(precision.rule.thresholds))
    assert limits[0].shape == (tiny.NUM_LAYERS * 7, len(BITS) - 1)
    for low, high in pairwise(limits):
        assert bool((high > low).all())


def test_the_threshold_of_skipping_grows_with_the_price(data: CalibrationData) -> None:
    found = [make(data, nats_per_work, ["skipping"]).kv for nats_per_work in (1e-6, *PRICES, 1e6)]
    thresholds = [threshold_at(each.skip_below, 0) for each in found]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < 0.01
    assert thresholds[-1] == 1.0


def test_entries_are_on_or_off_and_make_products_with_them_cheaper(data: CalibrationData) -> None:
    """In bit operations: a product with a code is worth a quarter, and so leaving it out is."""
    priced = replace(data, units=units_of(tiny.quantized("llama"), "bitops"))
    assert priced.units.pair == pytest.approx(4 * priced.units.entry)
    on, off = (
        make(priced, nats_per_work, names)
        for nats_per_work, names in ((2.0, ["skipping", "entries"]), (0.5, ["skipping"]))
    )
    assert on.kv == replace(off.kv, bits=8)
    assert off.kv.bits is None
    assert make(data, 2.0, ["skipping", "entries"]).kv == replace(
        make(data, 2.0, ["skipping"]).kv, bits=8
    )  # as many FLOPs
    assert make(data, 1e-9, ["entries"]).kv.bits == 8


def test_fusion_has_a_cosine_instead_of_a_price(data: CalibrationData) -> None:
    plans = [build(Candidate(nats_per_work, {"fusion": 0.7}), data, "mine", BITS) for nats_per_work in PRICES]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0].fusion is not None
    assert plans[0].fusion.rule == CosineFusionRule(0.7)


def test_the_higher_the_price_the_less_work(data: CalibrationData) -> None:
    spent = [flops(make(data, nats_per_work)) for nats_per_work in (1e-9, 0.3, 2.0, 10.0, 100.0)]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < 0.6 * spent[0]


def test_a_price_of_nothing_saves_nothing(data: CalibrationData) -> None:
    dense, plan = Plan.dense(), make(data, 1e-9)
    trace = run_whole(decoder(tiny.quantized("llama"), plan), WINDOWS[1]).trace
    assert trace.mean_depth == tiny.NUM_LAYERS
    assert all(not layer.shortcut_rows["mlp"] and not layer.shortcut_rows["attention"] for layer in trace.layers)
    assert trace.macs_by_bits[8] >= 0.999 * sum(trace.macs_by_bits)
    assert trace.values_read(4) > 0.999
    assert flops(plan) >= 0.999 * flops(dense)


@pytest.mark.parametrize("mechanism", ALL)
def test_a_mechanism_left_out_is_off_and_nothing_else_changes(data: CalibrationData, mechanism: Any) -> None:
    candidate = Candidate(5.0, {**dict.fromkeys(ALL, 1.0), "fusion": 0.9})
    whole, plan = (build(each, data, "mine", BITS) for each in (candidate, candidate.without(mechanism)))
    parts = {
        "halting": lambda each: each.halting.rule,
        "shortcuts": lambda each: each.shortcuts or None,
        "skipping": lambda each: each.kv.skip_below or None,
        "channels": lambda each: each.precision,
        "fusion": lambda each: each.fusion,
    }
    for name, part in parts.items():
        assert part(whole) is not None
        assert part(plan) == (None if name == mechanism else part(whole))


def test_a_factor_multiplies_the_price_of_its_mechanism_alone(data: CalibrationData) -> None:
    base, other = (build(Candidate(2.0, {"halting": 1.0, "skipping": f}), data, "mine", BITS) for f in (1.0, 1e-7))
    assert base.halting == other.halting
    assert base.kv.skip_below != other.kv.skip_below
    dearer = build(Candidate(0.5, {"halting": 4.0}), data, "mine", BITS)
    assert dearer.halting == base.halting


@pytest.mark.parametrize(("fill", "kind"), [("propagate", PropagateFill), ("drop", DropFill)])
def test_fills(data: CalibrationData, fill: str, kind: type) -> None:
    assert isinstance(make(data, 5.0, fill=fill).kv.fill, kind)


def test_a_plan_holds_the_tensors_that_it_uses_and_no_others(data: CalibrationData) -> None:
    assert make(data, 5.0, ["skipping"]).tensors is None
    with_means = data.tensors | {"mean.0.0": torch.zeros(32)}  # whether fitting finds that means pay or not
    for centred in (False, True):
        means = make(replace(data, centred=centred, tensors=with_means), 5.0, ["channels"]).tensors or {}
        assert bool(means) == centred
        assert all(name.startswith("mean.") for name in means)
    halting = make(data, 5.0, ["halting"]).tensors
    assert halting is not None
    assert {name.rsplit(".", 1)[0] for name in halting} == {"output.1", "output.2", "gate.1", "gate.2"}
    plan = make(data, 0.5, ["shortcuts"])
    assert plan.tensors is not None
    assert {name.rsplit(".", 1)[0] for name in plan.tensors} == {each.name for each in plan.shortcuts}


@pytest.mark.parametrize("layer_idx", [1, 2])
def test_an_exit_halts_all_tokens_at_its_layer(data: CalibrationData, layer_idx: int) -> None:
    plan = static_exit(layer_idx, data)
    run = run_whole(
        decoder(tiny.quantized("llama"), plan, special_ids=(0,)), torch.cat((torch.tensor([0]), WINDOWS[0]))
    )
    halted = [layer.halted for layer in run.trace.layers]
    assert halted == [61 if i == layer_idx else 0 for i in range(tiny.NUM_LAYERS)]
    assert run.trace.mean_depth == layer_idx + 1
    assert run.trace.layers[layer_idx].fitted_macs == 61 * tiny.HIDDEN_SIZE**2  # all of them predict through the map
    assert Plan.from_dict(plan.to_dict(), tensors=plan.tensors) == plan


def test_a_model_of_one_layer_has_no_layer_to_halt_after() -> None:
    config = tiny.CONFIGS["llama"]().to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    model = tiny.from_config(LlamaConfig(**config))
    data = fit(adapt(model), ("halting", "shortcuts", "skipping"), units_of(model, "flops"), WINDOWS, (8, 0))
    plan = make(data, 5.0, ["halting", "shortcuts", "skipping"])
    assert plan.halting is not None
    assert plan.halting.rule is None
    assert plan.shortcuts
    assert plan.kv.skip_below
    run_whole(decoder(model, plan), WINDOWS[0])


QUANTIZED = [(family, quantized) for family in tiny.LAYOUTS for quantized in (False, True)]


@pytest.mark.parametrize(("family", "quantized"), QUANTIZED)
@pytest.mark.parametrize("objective", ["flops", "bitops", "weight_bytes"])
def test_dense_work_in_units_adds_up_to_one(family: str, quantized: bool, objective: Objective) -> None:
    model = tiny.quantized(family) if quantized else tiny.model(family)
    spec, units, trace = adapt(model).spec, units_of(model, objective), dense_trace(model)
    tokens = trace.tokens
    linear = spec.macs * units.weight(spec.weight_bits)
    pairs = trace.dense_pairs() / tokens * spec.num_layers * spec.attention_macs_per_pair * units.pair
    head = trace.head_rows / tokens * spec.head_macs * units.weight(spec.head_bits)
    assert linear == pytest.approx(spec.num_layers * units.layer)
    # for bytes norms, biases, scales and exponents are left out, a good part of so small a model
    assert linear + pairs + head == pytest.approx(1.0, abs=0.35 if objective == "weight_bytes" else 1e-6)
    if objective != "flops":
        assert units.mac == 0.0
    else:
        assert units.bit == 0.0


def test_what_has_no_units_is_guided_by_flops() -> None:
    flops_units = units_of(tiny.quantized("llama"), "flops")
    assert [units_of(tiny.quantized("llama"), each) == flops_units for each in get_args(Objective)] == [
        True,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("objective", ["flops", "bitops", "weight_bytes"])
def test_a_shortcut_saves_what_the_model_reads_and_costs_what_its_map_does(
    quantized: bool, objective: Objective
) -> None:
    """The limit is what the sublayer's work is worth, at the bits of the model's weights, less its float32 map's."""
    model = tiny.quantized("llama") if quantized else tiny.model("llama")
    spec, units = adapt(model).spec, units_of(model, objective)
    tensors = {"shortcut.1.mlp.down": torch.zeros(32, 3), "shortcut.1.mlp.up": torch.zeros(3, 32)}
    data = CalibrationData(spec, units, tensors=tensors, shortcuts={(1, "mlp"): (2.0, 1e-9)})
    (shortcut,) = shortcuts_at(0.3, data)
    if objective == "flops":
        saved = (spec.layers[0].macs_of(*MLP) - 6 * 32) * units.mac
    else:
        saved = (spec.layers[0].macs_of(*MLP) * spec.weight_bits - 6 * 32 * 32) * units.bit
    assert shortcut.threshold == pytest.approx(0.3 * saved / 2.0)
