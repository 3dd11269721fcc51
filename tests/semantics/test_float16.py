"""A float16 model under a plan equals the same weights in float32: nothing leaves float16's range on the way.

Queries and keys are as those of Qwen2, whose biases are large; their products are beyond 65,504 before they are scaled.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from quicksilver import rules
from quicksilver.core.decisions import LayerView, PairView
from quicksilver.families.quantize import quantize_model
from quicksilver.ops import ragged_attention
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.config import LAYERS_ONLY
from quicksilver.weights.rounding import quantize
from tests import tiny, tolerances
from tests.engines import (
    decoder,
    fusion_plan,
    halting_plan,
    precision_plan,
    run_steps,
    run_whole,
    skipping_plan,
    with_maps,
)

BIAS = 250.0  # twice its square is above 65,504
FAMILIES = ("gpt2", "gpt2-inverse-layer-scale", "llama-tied-biased", "qwen2")
HALTING = halting_plan(rules.ForcedRule((2, 4, 3, 1)), rules.PropagateFill())
FUSION = fusion_plan(rules.ForcedFusionRule((False, True, True)), weights="mass")
FEW = 1e-3
"""A threshold below which next to nothing lies, so that no decision that rounding turns shows."""
MECHANISMS = {
    "by large components": skipping_plan(FEW),
    "by all components": skipping_plan(FEW, estimate_dims_above=0.0),
    "halting": skipping_plan(FEW, HALTING),
    "fusion": skipping_plan(FEW, FUSION),
}


@cache
def model(name: str, quantized: bool = False) -> tuple[Any, Any]:
    """Return a tiny model in float16, and one of the same weights in float32.

    In the two components of each head that turn slowest, queries and keys are their bias, so that rounding them to
    float16 changes nothing and the two models can be compared. Any-precision weights are not changed so: at fewer bits
    they do not hold zeros.
    """
    config = tiny.config_of(name)
    if "gpt2" not in name:
        config.rope_parameters["rope_theta"] = 1e30
    made = tiny.from_config(config)
    for weight, bias in () if quantized else _projections(made):
        slowest = torch.arange(len(bias)) % 4 == 3
        weight[slowest], bias[slowest] = 0.0, BIAS
    narrow = made.half()
    if quantized:
        quantize_model(narrow, LAYERS_ONLY)
    return narrow, copy.deepcopy(narrow).float()


def _projections(made: Any) -> list[tuple[Tensor, Tensor]]:
    """Return weight [out, in] and bias of each query and key projection, views."""
    if made.config.model_type == "gpt2":
        both = 2 * made.config.n_embd
        return [
            (block.attn.c_attn.weight.data.T[:both], block.attn.c_attn.bias.data[:both]) for block in made.transformer.h
        ]
    attentions = [layer.self_attn for layer in made.model.layers]
    return [(part.weight.data, part.bias.data) for a in attentions for part in (a.q_proj, a.k_proj)]


def assert_same(name: str, plan: Plan, quantized: bool = False, **options: Any) -> None:
    narrow, wide = (decoder(each, plan, **options) for each in model(name, quantized))
    ids = tiny.token_ids(24, 3)
    for feed in (run_whole, run_steps):
        one, other = feed(narrow, ids).logits.float(), feed(wide, ids).logits
        assert one.isfinite().all()
        assert (one - other).abs().max() / other.abs().max() < tolerances.LOGITS[torch.float16]


@pytest.mark.parametrize("plan", MECHANISMS.values(), ids=MECHANISMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_attention_leaves_out_is_the_same_as_in_float32(name: str, plan: Plan) -> None:
    assert_same(name, plan)


@pytest.mark.parametrize("plan", [Plan.dense(), HALTING, FUSION], ids=["dense", "halting", "fusion"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_backends_are_the_same_as_in_float32(name: str, backend: str, plan: Plan) -> None:
    assert_same(name, plan, attention=backend)


@pytest.mark.parametrize("rule", [rules.UniformBitsRule(6), rules.ChannelBitsRule((0.5,), (8, 6))], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_quantized_weights_are_the_same_as_in_float32(name: str, rule: rules.PrecisionRule) -> None:
    assert_same(name, skipping_plan(FEW, precision_plan(rule)), quantized=True)


LEFT_OUT: dict[str, dict[str, Any]] = {
    "nothing, by plain products": {"backend": "eager"},
    "by large components": {"skip_below": 0.7},
    "by all components": {"skip_below": 0.7, "estimate_dims_above": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masses", [False, True], ids=["single", "masses"])
@pytest.mark.parametrize("num_queries", [1, 7, 140])
@pytest.mark.parametrize("options", LEFT_OUT.values(), ids=LEFT_OUT)
def test_plain_products_are_those_of_float32_rounded_once(
    options: dict[str, Any], num_queries: int, masses: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_queries)

    def draw(count: int, heads: int, *large: float) -> Tensor:
        rows = torch.randn(count, heads, 64, generator=generator)
        rows[..., :20] += torch.tensor(large).repeat_interleave(20) if large else 0.0
        return rows.to(dtype)

    positions = torch.arange(140)
    inputs = draw(num_queries, 4, 75.0), draw(140, 2, 75.0), draw(140, 2)
    weighs = torch.randint(1, 700, (140,), generator=generator) if masses else None
    rest = positions[140 - num_queries :], positions, 0.125
    narrow = ragged_attention(*inputs, *rest, newest=True, masses=weighs, **options)
    wide = ragged_attention(*(t.float() for t in inputs), *rest, newest=True, masses=weighs, **options)
    assert torch.equal(narrow.output, wide.output.to(dtype))
    assert narrow.pairs == wide.pairs
    assert list(map(int, narrow.skipped)) == list(map(int, wide.skipped))


HALTING_RULES = [
    rules.DriftRule(1000.0),
    rules.DriftRule(70000.0),
    rules.RelativeDriftRule(0.5),
    rules.RelativeDriftRule(1.9),
    rules.FixedPointRule(5.0, min_cosine=0.9),
    rules.FixedPointRule(0.5, min_cosine=-1.0),
    rules.AllRule((rules.DriftRule(1e6), rules.FixedPointRule(5.0, min_cosine=0.5))),
]


@pytest.mark.parametrize("rule", HALTING_RULES, ids=str)
def test_halting_rules_decide_about_large_states_as_in_float32(rule: rules.HaltingRule) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after, update = (torch.randn(12, 32, generator=generator) for _ in range(3))
    before[:4, 5], after[:4, 5] = 300.0, 900.0  # whose squares float16 does not hold
    update[:6, 5] = torch.tensor([600.0, -600.0, 500.0, 0.0, 300.0, 300.0])
    before[4:8, 7], after[4:8, 7] = -4e4, torch.tensor([4e4, 1e4, -4e4, 6e4])  # and differences
    narrow = [t.half() for t in (before, after, update)]
    answers = []
    for parts in (narrow, [t.float() for t in narrow]):
        view = LayerView(1, *parts, torch.arange(12), torch.arange(12), lambda hidden: hidden[:, 0])
        answers.append(rule.decide(view).halt)
    assert torch.equal(*answers)
    assert answers[0].any()
    assert not answers[0].all()


@pytest.mark.parametrize(
    "rule",
    [rules.L2FusionRule(1000.0), rules.CosineFusionRule(0.7)],
    ids=lambda rule: type(rule).__name__,
)
def test_similarities_of_large_states_are_those_of_float32(rule: rules.FusionRule) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 12, 32, generator=generator)
    states[:, :4, 5] = torch.tensor([[900.0], [600.0]])
    states[:, 4:8, 7] = torch.tensor([[-4e4], [4e4]])
    answers = []
    for cast in (Tensor.half, lambda t: t.half().float()):
        view = PairView(1, 0, *cast(states), torch.arange(12), torch.arange(12))
        answers.append(rule.decide(view).alike)
    assert torch.equal(*answers)
    assert answers[0].any()
    assert not answers[0].all()


@pytest.mark.parametrize("rank", [None, 3])
def test_fitted_maps_of_large_states_are_those_of_float32(rank: int | None) -> None:
    """What lies between the two factors of a map of low rank may be beyond float16 where what it gives is not."""
    large = {"down": 1e4, "up": 1e-4}
    tensors = {
        name: tensor * next((factor for end, factor in large.items() if name.endswith(end)), 1.0)
        for name, tensor in tiny.fitted(rank=rank).items()
    }
    plan = with_maps(HALTING, PlanTensors(tensors))
    assert_same("qwen2", plan)


def test_parts_of_a_sum_over_channels_need_not_fit_float16() -> None:
    weight = torch.full((32, 64), 40.0)
    weight[:, 32:] = -40.0
    module = AnyPrecisionLinear(quantize(weight, 32), None)
    x, bits = torch.full((3, 64), 60.0), torch.full((3, 64), 8, dtype=torch.uint8)
    x[:, 0], bits[:, 32:] = 61.0, 6
    expected = module(x, bits)
    assert 60.0 * 40.0 * 32 > torch.finfo(torch.float16).max > expected.abs().max()
    torch.testing.assert_close(module(x.half(), bits).float(), expected, atol=0, rtol=1e-3)
