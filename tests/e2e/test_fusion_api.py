"""Fusion as users meet it: `generate`, chunked prefill, padded batches, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quicksilver
from quicksilver.errors import InputError
from quicksilver.plan import Plan
from quicksilver.rules import CosineFusionRule, ForcedFusionRule, FusionConfig, RandomFusionRule
from tests import tiny
from tests.e2e.conftest import SENTENCES, Outcome
from tests.e2e.prompts import ATOL, PROMPT, left_padded

PAIRS = Plan("pairs", fusion=FusionConfig(RandomFusionRule(0.6), layers=(1,), max_group=3, protect_first=1))
EVERYWHERE = Plan("all", fusion=FusionConfig(RandomFusionRule(0.6), layers=(1,), scope="all", protect_first=1))
SEVERAL = Plan("several", fusion=FusionConfig(RandomFusionRule(0.6), layers=(1, 2), protect_first=1))


def fused(model: Any) -> int:
    return sum(model.stats.fused_by_layer)


@pytest.mark.parametrize("plan", [PAIRS, EVERYWHERE], ids=lambda plan: plan.name)
@pytest.mark.parametrize("family", tiny.TELLING)
def test_chunked_prefill_generates_what_whole_prefill_does(family: str, plan: Plan) -> None:
    model, prompt = quicksilver.accelerate(tiny.model(family), plan), tiny.token_ids(23)[None]
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert fused(model) > 3
    for chunk in (1, 4, 7, 22):
        assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, prefill_chunk_size=chunk), whole)


@pytest.mark.parametrize("plan", [PAIRS, EVERYWHERE, SEVERAL], ids=lambda plan: plan.name)
def test_a_left_padded_batch_generates_what_each_does_alone(plan: Plan) -> None:
    model, batch = quicksilver.accelerate(tiny.model("qwen2"), plan), left_padded()
    together = model.generate(**batch, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], together, strict=True):
        alone = model.generate(ids[mask == 1][None], max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert torch.equal(row[-10:], alone[0, -10:])


def test_sampling_under_fusion_repeats_with_its_seed() -> None:
    model, outputs = quicksilver.accelerate(tiny.model("llama"), PAIRS), []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model.generate(PROMPT, max_new_tokens=12, do_sample=True, temperature=1.2, top_p=0.9))
    assert torch.equal(*outputs)
    assert fused(model) > 0


def test_a_call_fuses_only_tokens_whose_predictions_nobody_asked_for() -> None:
    model, ids = quicksilver.accelerate(tiny.model("gpt2"), PAIRS), tiny.token_ids(20)[None]
    dense = quicksilver.accelerate(tiny.model("gpt2"))
    every = model(ids).logits
    torch.testing.assert_close(every, dense(ids).logits, atol=ATOL, rtol=0)
    assert fused(model) == 0
    model(ids, labels=ids, logits_to_keep=1)
    assert fused(model) == 0
    with pytest.raises(InputError, match="labels ask for what every token predicts"):
        model(ids, labels=ids, prompt=True)
    last = model(ids, logits_to_keep=1)
    assert fused(model) > 3
    assert last.past_key_values.entry_counts(3)[0] == 20 - fused(model)
    model(ids[:, :1], past_key_values=last.past_key_values, logits_to_keep=1)
    assert fused(model) == 0
    model(ids, prompt=True)
    assert fused(model) > 3


def test_generation_without_a_cache_fuses_nothing_in_prompt_scope() -> None:
    model = quicksilver.accelerate(tiny.model("gpt2"), PAIRS)
    expected = quicksilver.accelerate(tiny.model("gpt2")).generate(PROMPT, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=5, do_sample=False, use_cache=False), expected)


def test_decode_reads_fewer_entries_after_a_fused_prompt() -> None:
    plan = Plan("half", fusion=FusionConfig(ForcedFusionRule((False, True)), layers=(1,), protect_first=0))
    token, ids = torch.tensor([[5]]), tiny.token_ids(40)[None]
    read = []
    for each in (Plan.dense(), plan):
        model = quicksilver.accelerate(tiny.model("llama"), each)
        cache = model(ids, logits_to_keep=1).past_key_values
        model(token, past_key_values=cache, logits_to_keep=1)
        read.append(model.stats.kv_read_bytes)
    entry = 2 * 2 * 8 * 4  # key and value, two heads of eight float32
    assert read == [4 * 41 * entry, (41 + 3 * 21) * entry]


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    config = FusionConfig(CosineFusionRule(-1.0), layers=(0.25,), max_group=3)
    Plan("pairs", fusion=config).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize("mode", ["score", "decode"])
def test_eval_scores_only_what_follows_a_fused_prompt(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], plan_path: Path, tmp_path: Path, mode: str
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(SENTENCES * 3)
    arguments = ("--context", 40, "--prompt", 24, "--max-tokens", 120, "--mode", mode, "--json", out)
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text, "--plan", plan_path, *arguments)
    assert outcome.status == 0, outcome.err
    (result,) = json.loads(out.read_text())
    assert result["tokens_scored"] == 120 - 24
    assert result["protocol"]["prompt"] == 24
    prompt = result["accelerated"]["prompt"]
    assert prompt["tokens"] == result["protocol"]["windows"] * 24
    assert prompt["fused_fraction"] > 0.5
    assert prompt["flops_reduction"] > 0.3
    assert 0.0 < result["accelerated"]["fused_fraction"] < prompt["fused_fraction"]
    assert result["delta"]["kv_used_bytes_reduction"] > 0.2
    assert result["delta"]["kv_read_bytes_reduction"] > 0.2
    assert sum(int(size) * count for size, count in prompt["groups_by_size"].items()) > 30
    assert "after a prompt of 24" in outcome.out
    prompts = outcome.out.split("\n\n")[4].splitlines()
    shown = [f"{prompt['tokens']}", f"{prompt['fused_fraction']:.1%}", f"{prompt['flops_reduction']:+.1%}"]
    assert (prompts[1].split()[0], prompts[3].split()[:4]) == ("prompts", ["pairs", *shown])


def test_generate_accepts_a_plan_with_fusion(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], plan_path: Path
) -> None:
    prompt = "the river rises in the mountains"
    outcome = cli("generate", tiny_model_dir("gpt2"), prompt, "--plan", plan_path, "--max-new-tokens", 4, "--stats")
    assert outcome.status == 0, outcome.err
    assert " fused)" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", 40), "the prompt must lie between 1 and 39 for this context, got 40"),
        (("--prompt", 39, "--context", 40, "--stride", 2), "a prompt of 39"),
        (("--prompt", 24, "--stride", 30), "a prompt of 24"),
        (("--prompt", 0), "--prompt"),
    ],
)
def test_impossible_prompts_are_refused(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], tmp_path: Path, options: Any, message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 3)
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text, "--context", 40, *options)
    assert outcome.status == 2
    assert message in outcome.err
