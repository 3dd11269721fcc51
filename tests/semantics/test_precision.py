"""BitsChoice chosen in the layer loop equal their definition, however tokens are fed and whatever else is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quicksilver import rules
from quicksilver.core.bits import WEIGHT_BITS
from quicksilver.errors import PlanError
from quicksilver.families.cost import dense_cost, executed_cost
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import ChannelBitsRule, EntropyBitsRule, UniformBitsRule
from quicksilver.rules.precision.base import mean_name
from tests import oracle, tiny, tolerances
from tests.engines import Run, decoder, precision_plan, run_batch, run_chunks, run_steps, run_whole
from tests.oracle_parts import head_entropy, linear_maps

CHANNEL = ChannelBitsRule((3.0, 1.5, 0.7, 0.3), bits=(8, 6, 4, 2, 0))
TOKEN = EntropyBitsRule((7.1, 6.6), layer=2)
RULES = {
    "uniform 4": UniformBitsRule(4),
    "uniform 6": UniformBitsRule(6),
    "channel": CHANNEL,
    "channel, map by map": ChannelBitsRule(tuple((4.0 / (i + 1), 1.0 / (i + 1)) for i in range(24)), bits=(8, 2, 0)),
    "entropy": TOKEN,
    "entropy of the state": EntropyBitsRule((3.0, 2.0), over="hidden", layer=2),
}
ATOL = tolerances.LOGITS[torch.float64]


def rule_for(name: str, family: str) -> rules.PrecisionRule:
    """Return a rule; sets of thresholds are as many as the family's 4 layers have maps."""
    rule = RULES[name]
    if name == "channel, map by map" and family != "gpt2":
        return ChannelBitsRule(tuple((4.0 / (i + 1), 1.0 / (i + 1)) for i in range(28)), bits=(8, 2, 0))
    return rule


class Definition:
    """What each rule means, row by row; the most bits are decided as layers go by."""

    def __init__(self, model, rule: rules.PrecisionRule, protected: Callable[[int], bool] = lambda t: False) -> None:
        self.model, self.rule, self.protected = model, rule, protected
        self.max_bits: list[int] | None = None

    def after_layer(self, layer_idx: int, before: Tensor, after: Tensor, previous: Tensor | None) -> Tensor:
        """Stand in for a halting rule that halts nobody."""
        rule = self.rule
        if isinstance(rule, EntropyBitsRule) and layer_idx == rule.layer - 1:
            if rule.over == "head":
                entropy = head_entropy(self.model, after)
            else:
                probs = torch.softmax(after.float(), dim=-1)
                entropy = -(probs * probs.log2()).sum(-1)
            self.max_bits = [self.grade(rule, float(value), rule.thresholds) for value in entropy]
        return torch.zeros(len(after), dtype=torch.bool)

    @staticmethod
    def grade(rule: rules.GradedBitsRule, score: float, thresholds) -> int:
        return next((w for w, limit in zip(rule.bits, thresholds, strict=False) if score >= limit), rule.bits[-1])

    def bits(self, rule: rules.PrecisionRule, t: int, score: float, thresholds) -> int:
        if self.protected(t):
            return 8
        if isinstance(rule, UniformBitsRule):
            return rule.bits
        most = 8 if self.max_bits is None else self.max_bits[t]
        if isinstance(rule, EntropyBitsRule):
            return most
        return self.grade(rule, score, thresholds)

    def read(self, layer_idx: int, module, x: Tensor) -> Tensor:
        thresholds = None
        if isinstance(self.rule, ChannelBitsRule):
            thresholds = self.rule.thresholds
            if isinstance(thresholds[0], tuple):
                of_layer = len(thresholds) // 4
                maps = linear_maps(self.model, layer_idx)
                thresholds = thresholds[layer_idx * of_layer + next(i for i, m in enumerate(maps) if m is module)]
        scores = (x.abs() * module.dequantize().norm(dim=0)).tolist()
        chosen = torch.tensor([[self.bits(self.rule, t, s, thresholds) for s in row] for t, row in enumerate(scores)])
        y = torch.zeros(len(x), module.num_outputs, dtype=x.dtype)
        for bits in WEIGHT_BITS:
            y += torch.where(chosen == bits, x, 0.0) @ module.dequantize(bits).to(x.dtype).T
        return y if module.bias is None else y + module.bias


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", [*tiny.TELLING, "mistral-window", "phi3"])
def test_widths_equal_their_definition(name: str, family: str) -> None:
    model, ids, rule = tiny.quantized(family, torch.float64), tiny.token_ids(9), rule_for(name, family)
    run = run_whole(decoder(model, precision_plan(rule)), ids)
    meaning = Definition(model, rule)
    expected = oracle.run(model, ids, rules.DropFill(), meaning.after_layer, read=meaning.read)
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    used = sum(count > 0 for count in run.trace.macs_by_bits)
    assert used == 1 if name.startswith("uniform") else used > 1


@pytest.mark.parametrize("bits", [(8, 0), (8, 4, 2, 0)])
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_centred_channels_stand_at_their_mean(family: str, bits: tuple[int, ...]) -> None:
    """What differs from the mean is read at the bits that it deserves; the mean's own product is added."""
    model, ids = tiny.quantized(family, torch.float64), tiny.token_ids(9)
    rule = ChannelBitsRule((0.3, 0.1, 0.03)[: len(bits) - 1], bits, centred=True)
    meaning = Definition(model, rule)
    generator = torch.Generator().manual_seed(0)
    means = {
        (layer, i): 0.2 * torch.randn(module.num_inputs, generator=generator)
        for layer in range(tiny.NUM_LAYERS)
        for i, module in enumerate(linear_maps(model, layer))
    }

    def read(layer_idx: int, module, x: Tensor) -> Tensor:
        i = next(i for i, each in enumerate(linear_maps(model, layer_idx)) if each is module)
        mean = means[layer_idx, i].to(x.dtype)
        return meaning.read(layer_idx, module, x - mean) + mean @ module.dequantize().to(x.dtype).T

    tensors = PlanTensors({mean_name(*place): mean for place, mean in means.items()})
    run = run_whole(decoder(model, precision_plan(rule, tensors=tensors)), ids)
    expected = oracle.run(model, ids, rules.DropFill(), meaning.after_layer, read=read)
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)
    assert sum(count > 0 for count in run.trace.macs_by_bits) > 1
    plain = run_whole(decoder(model, precision_plan(replace(rule, centred=False))), ids)
    assert not torch.allclose(run.logits, plain.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("tensors", [{}, {"mean.0.0": torch.zeros(3)}], ids=["missing", "of another shape"])
def test_means_that_do_not_fit_the_model_are_refused(tensors: dict[str, Tensor]) -> None:
    rule = ChannelBitsRule((0.1,), (8, 0), centred=True)
    with pytest.raises(PlanError, match=r"mean\.0\.0"):
        decoder(tiny.quantized("llama"), precision_plan(rule, tensors=PlanTensors(tensors)))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_protected_tokens_read_everything(name: str, family: str) -> None:
    model, ids, rule = tiny.quantized(family, torch.float64), tiny.token_ids(8), rule_for(name, family)
    ids[5] = 7
    config = rules.PrecisionConfig(rule, protect_first=2, protect_special=True)
    run = run_whole(decoder(model, Plan("test", precision=config), special_ids=[7]), ids)
    meaning = Definition(model, rule, protected=lambda t: t in (0, 1, 5))
    expected = oracle.run(model, ids, rules.DropFill(), meaning.after_layer, read=meaning.read)
    torch.testing.assert_close(run.logits, expected.logits, atol=ATOL, rtol=0)


def test_eight_bits_throughout_are_the_quantized_model_itself() -> None:
    for family in tiny.FAMILIES:
        model, ids = tiny.quantized(family), tiny.token_ids(20)
        dense, uniform = (
            run_whole(decoder(model, plan), ids) for plan in (Plan.dense(), precision_plan(UniformBitsRule(8)))
        )
        assert torch.equal(dense.logits, uniform.logits)
        assert decoder(model, Plan.dense()).spec.parameters == decoder(tiny.model(family), Plan.dense()).spec.parameters
        with torch.no_grad():
            reference = model(ids[None]).logits[0]
        torch.testing.assert_close(dense.logits, reference, atol=tolerances.LOGITS[torch.float32], rtol=0)


PROPAGATE = rules.KVConfig(rules.PropagateFill())
HALTING = rules.HaltingConfig(rules.ForcedRule((4, 3, 1, 2)), min_layer=1, protect_first=0, protect_special=False)
FUSING = rules.FusionConfig(
    rules.ForcedFusionRule((False, True, True, False, True)),
    layers=(2,),
    max_group=3,
    weights="mass",
    scope="all",
    protect_first=0,
    protect_special=False,
)


def same(one: Run, other: Run) -> None:
    torch.testing.assert_close(one.logits, other.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("fill", [rules.DropFill(), rules.PropagateFill()], ids=lambda fill: type(fill).__name__)
def test_one_meaning_however_tokens_are_fed_with_halting(name: str, family: str, fill: rules.FillRule) -> None:
    plan = precision_plan(rule_for(name, family), halting=HALTING, kv=rules.KVConfig(fill))
    engine, ids = decoder(tiny.quantized(family, torch.float64), plan), tiny.token_ids(14)
    whole = run_whole(engine, ids)
    for fed in (run_steps(engine, ids), run_chunks(engine, ids, [4, 1, 9])):
        same(whole, fed)
        assert fed.trace.macs_by_bits == whole.trace.macs_by_bits
        assert executed_cost(engine.spec, fed.trace) == executed_cost(engine.spec, whole.trace)
    sequences = [tiny.token_ids(n, seed=n) for n in (5, 1, 12)]
    alone = torch.cat([run_whole(engine, each).logits for each in sequences])
    torch.testing.assert_close(run_batch(engine, sequences).logits, alone, atol=ATOL, rtol=0)


def same_cache(one: Run, other: Run) -> None:
    for layer_idx in range(4):
        first, second = one.cache.entries(layer_idx, 0), other.cache.entries(layer_idx, 0)
        assert torch.equal(first.positions, second.positions)
        torch.testing.assert_close(first.keys, second.keys, atol=ATOL, rtol=0)
        torch.testing.assert_close(first.values, second.values, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_with_fusion_the_cache_and_the_last_token_are_the_same(name: str, family: str) -> None:
    plan = precision_plan(rule_for(name, family), halting=HALTING, kv=PROPAGATE, fusion=FUSING)
    engine, ids = decoder(tiny.quantized(family, torch.float64), plan), tiny.token_ids(17)
    whole, steps = run_whole(engine, ids), run_steps(engine, ids)
    torch.testing.assert_close(whole.logits[-1], steps.logits[-1], atol=ATOL, rtol=0)
    same_cache(whole, steps)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_flops_fall_by_skipped_channels_alone(family: str) -> None:
    """Token by token nothing is multiplied that is not counted, so PyTorch's counter agrees to the last FLOP."""
    ids = tiny.token_ids(3)
    for rule in (CHANNEL, UniformBitsRule(4)):
        engine = decoder(tiny.quantized(family), precision_plan(rule), attention="eager")
        run = run_steps(engine, ids)
        cost, dense = executed_cost(engine.spec, run.trace), dense_cost(engine.spec, run.trace)
        with FlopCounterMode(display=False) as counter:
            run_steps(engine, ids)
        scores = sum(layer.signal_rows["score"] for layer in run.trace.layers)
        assert cost.flops - 2 * scores == counter.get_total_flops()
        assert cost.flops - 2 * scores == dense.flops - 2 * run.trace.macs_by_bits[0]


def test_bitops_and_bytes_follow_what_is_read() -> None:
    model, ids = tiny.quantized("llama"), tiny.token_ids(6)
    costs, spec = {}, decoder(model, Plan.dense()).spec
    for bits in (8, 6, 4, 2):
        engine = decoder(model, precision_plan(UniformBitsRule(bits)))
        costs[bits] = executed_cost(spec, run_whole(engine, ids).trace)
    linear = 6 * spec.macs
    assert costs[8].bitops - costs[4].bitops == linear * 4 * 32
    assert costs[8].bitops - costs[6].bitops == linear * 2 * 32
    assert {cost.flops for cost in costs.values()} == {costs[8].flops}
    assert costs[8] == dense_cost(spec, run_whole(decoder(model, Plan.dense()), ids).trace)
    # the first plane has four bits and is read for two, the second has the other four and is read for six
    planes = {bits: 6 * spec.macs * left // 8 for bits, left in ((6, 0), (4, 4), (2, 4))}
    for bits, saved in planes.items():
        assert costs[8].weight_bytes - costs[bits].weight_bytes == saved


PAIRS = 4 * 21 * 2 * 4 * 8 * 32 * 32  # 4 layers, 6 * 7 / 2 pairs, score and value, 4 heads of 8, float32 both sides
HEAD = 6 * 300 * 32 * 32 * 32  # a vocabulary of 300 and states of 32, in float32
MACS = 6 * 4 * 7680  # q and o 32 x 32, k and v 32 x 16, gate and up 32 x 48, down 48 x 32
PLAIN = 6 * (4 * 2 * 32 * 4 + 32 * 4 + 300 * 32 * 4)  # norms of layers, the final norm and the head
SCORES = 6 * 4 * 240  # input channels: six maps of 32 and one of 48
BITS_8 = 6 * 4 * (2 * 32 * 36 + 2 * 32 * 18 + 2 * 32 * 54 + 48 * 36)
BITS_4 = 6 * 4 * (2 * 32 * 20 + 2 * 32 * 10 + 2 * 32 * 30 + 48 * 20)


@pytest.mark.parametrize(
    ("rule", "weight_bytes", "bitops"),
    [
        (None, PLAIN + BITS_8, 111_673_344),
        (UniformBitsRule(8), PLAIN + BITS_8, PAIRS + HEAD + MACS * 8 * 32),
        (UniformBitsRule(4), PLAIN + BITS_4, PAIRS + HEAD + MACS * 4 * 32),
        (
            ChannelBitsRule((0.0,), bits=(4, 2)),
            PLAIN + BITS_4 + 4 * SCORES,
            PAIRS + HEAD + MACS * 4 * 32 + SCORES * 32 * 32,
        ),
        (ChannelBitsRule((1e9,), bits=(4, 0)), PLAIN + 4 * SCORES, PAIRS + HEAD + SCORES * 32 * 32),
    ],
    ids=["dense", "uniform 8", "uniform 4", "all at 4 by score", "nothing by score"],
)
def test_bitops_and_bytes_are_those_counted_by_hand(
    rule: rules.PrecisionRule | None, weight_bytes: int, bitops: int
) -> None:
    """Six tokens of the tiny Llama; a channel's run is its codes, and an eighth of a byte of scales an output."""
    plan = Plan.dense() if rule is None else precision_plan(rule)
    engine = decoder(tiny.quantized("llama"), plan)
    cost = executed_cost(engine.spec, run_whole(engine, tiny.token_ids(6)).trace)
    assert (cost.weight_bytes, cost.bitops) == (weight_bytes, bitops)
