"""Scoring: the loss is transformers' loss, both modes agree, intervals are paired and reproducible."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import quicksilver
from quicksilver.measure.report import evaluate
from quicksilver.measure.scoring import MIN_TIMINGS, run_windows
from quicksilver.measure.statistics import paired_delta
from quicksilver.measure.windows import WindowConfig, WindowedText, slide
from quicksilver.plan import Plan
from quicksilver.rules import ForcedRule, RandomFusionRule, RandomRule, ZeroFill
from tests import tiny, tolerances
from tests.engines import decoder, fusion_plan, halting_plan, skipping_plan

WINDOW_CONFIG = WindowConfig(20, 10, bos_id=0)
IDS = tiny.token_ids(75).tolist()
TEXT = WindowedText("random ids", tuple(slide(IDS, WINDOW_CONFIG)), scored_bytes=300)


def reference_nll(model) -> float:
    total = 0.0
    for window in TEXT.windows:
        ids = torch.tensor(window.token_ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total += losses[window.first_scored - 1 :].sum().item()
    return total / len(IDS)


@pytest.mark.parametrize("family", tiny.TELLING)
@pytest.mark.parametrize("mode", ["score", "decode"])
def test_dense_loss_is_transformers(family: str, mode: str) -> None:
    model = tiny.model(family)
    plan = halting_plan(RandomRule(0.3))
    (result,) = evaluate(quicksilver.accelerate(model), [plan], TEXT, WINDOW_CONFIG, mode)  # type: ignore[arg-type]
    assert result["dense"]["nll"] == pytest.approx(reference_nll(model), abs=tolerances.LOSS)
    assert result["tokens_scored"] == 75
    assert result["dense"]["bits_per_byte"] == pytest.approx(result["dense"]["nll"] * 75 / math.log(2) / 300)
    assert result["delta"]["kl"] > 0.0
    assert 1.0 < result["accelerated"]["mean_depth"] < 4.0


def test_score_and_decode_agree_on_everything_but_cost() -> None:
    model, plans = quicksilver.accelerate(tiny.model("llama")), [halting_plan(RandomRule(0.3), ZeroFill())]
    (score,), (decode,) = (evaluate(model, plans, TEXT, WINDOW_CONFIG, mode) for mode in ("score", "decode"))
    for key in ("nll", "kl", "top1_agreement"):
        assert score["delta"][key] == pytest.approx(decode["delta"][key], abs=tolerances.LOSS), key


def test_score_and_decode_agree_after_a_fused_prompt() -> None:
    window_config = WindowConfig(20, 6, bos_id=0, prompt=12)
    text = WindowedText("random ids", tuple(slide(IDS, window_config)), scored_bytes=300)
    plan = fusion_plan(RandomFusionRule(0.7), RandomRule(0.1), scope="prompt", layers=(1, 2))
    model = quicksilver.accelerate(tiny.model("llama"))
    (score,), (decode,) = (evaluate(model, [plan], text, window_config, mode) for mode in ("score", "decode"))
    for result in (score, decode):
        assert result["accelerated"]["prompt"].pop("speedup") > 0.0
    assert score["accelerated"]["prompt"] == decode["accelerated"]["prompt"]
    assert score["accelerated"]["prompt"]["fused_fraction"] > 0.3
    assert score["tokens_scored"] == 75 - 12
    for key in ("nll", "kl", "top1_agreement", "kv_used_bytes_reduction"):
        assert score["delta"][key] == pytest.approx(decode["delta"][key], abs=tolerances.LOSS), key


def test_without_a_prompt_only_decode_fuses_in_prompt_scope() -> None:
    """In `score` every token's prediction is asked for or might be; in `decode` what is not scored is a prompt."""
    model, plan = quicksilver.accelerate(tiny.model("gpt2")), fusion_plan(RandomFusionRule(0.7), scope="prompt")
    (score,), (decode,) = (evaluate(model, [plan], TEXT, WINDOW_CONFIG, mode) for mode in ("score", "decode"))
    assert score["accelerated"]["fused_fraction"] == 0.0
    assert score["delta"]["nll"] == 0.0
    assert score["accelerated"]["prompt"] is None
    assert decode["accelerated"]["prompt"]["fused_fraction"] > 0.2
    assert decode["delta"]["nll"] != 0.0


def test_a_dense_plan_changes_nothing_and_saves_nothing() -> None:
    (result,) = evaluate(quicksilver.accelerate(tiny.model("gpt2")), [Plan.dense()], TEXT, WINDOW_CONFIG)
    delta = {k: v for k, v in result["delta"].items() if k not in ("speedup", "top1_agreement")}
    assert all(value in (0.0, [0.0, 0.0]) for value in delta.values()), delta
    assert result["delta"]["top1_agreement"] == 1.0


def test_forced_halting_costs_what_arithmetic_says() -> None:
    """Half of the layers for every token: body FLOPs halve exactly, the head stays."""
    model = quicksilver.accelerate(tiny.model("llama"))
    for mode in ("score", "decode"):
        (result,) = evaluate(model, [halting_plan(ForcedRule((2,)))], TEXT, WINDOW_CONFIG, mode)  # type: ignore[arg-type]
        assert result["delta"]["flops_body_reduction"] == pytest.approx(0.5)
        assert 0.0 < result["delta"]["flops_reduction"] < 0.5
        assert result["delta"]["kv_bytes_reduction"] == pytest.approx(0.5)
        assert result["accelerated"]["mean_depth"] == 2.0


def test_what_is_skipped_is_reported_and_saves_attention_alone() -> None:
    model, plans = tiny.model("llama", torch.float64), [Plan.dense(), skipping_plan(0.5)]
    spec = decoder(model, Plan.dense()).spec
    for mode in ("score", "decode"):
        dense, skipping = evaluate(quicksilver.accelerate(model), plans, TEXT, WINDOW_CONFIG, mode)  # type: ignore[arg-type]
        assert dense["accelerated"]["values_read"] == dense["accelerated"]["query_components_read"] == 1.0
        values, scores = (skipping["accelerated"][name] for name in ("values_read", "query_components_read"))
        assert 0.1 < values < scores < 0.9
        flops = [skipping[side]["flops_body_per_token"] for side in ("dense", "accelerated")]
        attention = flops[0] - 2 * spec.macs
        squares = 2 * spec.num_layers * spec.num_heads * spec.head_dim
        softmax = attention / 2 / spec.head_dim  # one for each score
        saved = (2 - values - scores) * attention / 2
        assert flops[0] - flops[1] == pytest.approx(saved - squares - softmax)


def test_few_windows_are_timed_often_enough() -> None:
    engines = [decoder(tiny.model("gpt2"), Plan.dense()) for _ in range(2)]
    records = run_windows(engines, TEXT.windows[:2], "score")
    assert all(len(record.seconds) >= MIN_TIMINGS for record in records)
    assert all(len(record.nll) == 2 for record in records)
    assert records[0].trace.tokens == sum(len(window.token_ids) - 1 for window in TEXT.windows[:2])


def test_paired_intervals_cover_the_difference_and_repeat() -> None:
    dense, tokens = [100.0, 210.0, 160.0, 90.0] * 5, [50, 100, 80, 45] * 5
    plan = [x + 1.0 + 0.1 * i for i, x in enumerate(dense)]
    delta = paired_delta(dense, plan, tokens)
    assert delta == paired_delta(dense, plan, tokens)
    assert delta.nll == pytest.approx((sum(plan) - sum(dense)) / sum(tokens))
    assert delta.nll_ci95[0] < delta.nll < delta.nll_ci95[1]
    assert delta.ppl_ci95[0] < delta.ppl < delta.ppl_ci95[1]
    assert paired_delta([100.0], [110.0], [50]).nll_ci95 is None  # one window says nothing of the spread
    same = paired_delta(dense, dense, tokens)
    assert same.ppl_ci95 == (0.0, 0.0)


def test_divergence_is_from_the_dense_prediction() -> None:
    """KL(dense || plan), summed over the vocabulary with the dense model's probabilities as weights."""
    model, (window,) = tiny.model("qwen2"), TEXT.windows[:1]
    engines = [decoder(model, Plan.dense()), decoder(model, halting_plan(ForcedRule((2,))))]
    records = run_windows(engines, [window], "score")
    ids = torch.tensor(window.token_ids)[:-1]
    dense, plan = (
        torch.log_softmax(e.logits(e.run(ids, [len(ids)], e.new_cache(1), e.new_trace()), e.new_trace()), -1)
        for e in engines
    )
    expected = F.kl_div(plan, dense, log_target=True, reduction="none").sum(-1)[window.first_scored - 1 :].sum()
    assert records[1].kl == pytest.approx(expected.item(), rel=tolerances.DIVERGENCE)
    assert records[1].agreed == int((dense.argmax(-1) == plan.argmax(-1))[window.first_scored - 1 :].sum())
