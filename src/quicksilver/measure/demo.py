"""The demonstration: measure the embedded models on the embedded articles, generate a sample, draw it all.

Everything it reads comes with the package; nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quicksilver.core.files import write_atomically
from quicksilver.measure.picture import TokenPanel, draw_summary
from quicksilver.measure.report import evaluate
from quicksilver.measure.texts import Corpus
from quicksilver.measure.windows import WindowConfig, WindowedText, cut, default_bos
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import Plan
from quicksilver.rules import RelativeDriftRule
from quicksilver.runtime.loop import Decoder
from quicksilver.runtime.stats import RunStats

ARTICLES = Path(__file__).parent.parent / "data" / "demo"
PLANS = ("paper", "relative", "settled")
BITS_PLANS = ("uniform-8bit",)
PROMPT_PLANS = ("fused-prompt",)
LOOSER = (0.2, 0.25, 0.3, 0.4, 0.6, 1.0, 2.0)  # thresholds for `relative` where its own stops next to no token
STOPPED = 0.1  # share of the tokens shown that should stop early
PROMPT = "The river rises in the mountains and"


@dataclass(frozen=True)
class Sample:
    """A continuation of the prompt under a plan, and what it ran."""

    plan: str
    text: str
    stats: RunStats


def demo_corpus() -> Corpus:
    """Return the embedded articles, each its own document."""
    texts = tuple(path.read_text(encoding="utf-8") for path in sorted(ARTICLES.glob("*.txt")))
    return Corpus("the embedded articles", texts, separate=True)


@dataclass(frozen=True)
class Part:
    """Plans to compare with dense, and the windows on which that is done."""

    plans: tuple[Plan, ...]
    window_config: WindowConfig
    text: WindowedText


def parts(tokenizer: Any, max_positions: int, max_tokens: int) -> tuple[Part, Part]:
    """Return what is measured: plans that halt on all of a text, plans that fuse on what follows a prompt."""
    context, bos = min(max_positions, 512, max_tokens), default_bos(tokenizer)
    prompt = 3 * context // 4
    protocols = (
        WindowConfig(context, context // 2, bos, max_tokens),
        WindowConfig(context, context - (bos is not None) - prompt, bos, max_tokens, prompt),
    )
    corpus = demo_corpus()
    first, second = (
        Part(tuple(Plan.preset(name) for name in names), window_config, cut(corpus, tokenizer, window_config))
        for names, window_config in zip((PLANS, PROMPT_PLANS), protocols, strict=True)
    )
    return first, second


def sample(model: QuickSilverForCausalLM, tokenizer: Any, plan: Plan, max_new_tokens: int = 40) -> Sample:
    """Continue the demonstration's prompt greedily under a plan."""
    limit = model.adapter.spec.max_positions
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, : limit // 2]
    before, model.plan = model.plan, plan
    try:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, limit - ids.shape[1]),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        return Sample(plan.name, tokenizer.decode(out[0], skip_special_tokens=True), model.stats)
    finally:
        model.plan = before


def shallowest(results: Sequence[dict[str, Any]]) -> Plan:
    """Return which of the halting presets ran the fewest layers per token."""
    named = {result["plan"]["name"]: result["accelerated"]["mean_depth"] for result in results}
    return Plan.preset(min(PLANS, key=lambda name: named.get(name, float("inf"))))


def token_depths(model: QuickSilverForCausalLM, plan: Plan, token_ids: Sequence[int], prompt: bool) -> list[int]:
    """Return how many layers each token of one sequence, a prompt or not, ran under a plan."""
    decoder = Decoder(model.adapter, plan, model.special_ids)
    trace = decoder.new_trace(per_token=True)
    decoder.run(torch.tensor(token_ids, device=model.device), [len(token_ids)], decoder.new_cache(1), trace, prompt)
    return trace.depths[0].tolist()


def stopping(model: QuickSilverForCausalLM, first: Plan, token_ids: Sequence[int]) -> tuple[Plan, list[int]]:
    """Return a plan under which some of a text's tokens stop early, and how many layers each of them ran.

    Args:
        model: the model.
        first: returned where that is true of it; else `relative` is, with the lowest threshold that will do.
        token_ids: of the text.
    """
    relative = Plan.preset("relative")
    assert relative.halting is not None
    looser = [
        replace(
            relative,
            name=f"relative, threshold {limit:g}",
            halting=replace(relative.halting, rule=RelativeDriftRule(limit)),
        )
        for limit in LOOSER
    ]
    plan, depths = first, token_depths(model, first, token_ids, False)
    for other in looser:
        if sum(depth < model.adapter.spec.num_layers for depth in depths) >= STOPPED * len(depths):
            break
        plan, depths = other, token_depths(model, other, token_ids, False)
    return plan, depths


def run(
    model: QuickSilverForCausalLM,
    tokenizer: Any,
    name: str,
    measured: Sequence[Part],
    folder: Path,
    on_window: Callable[[], None] = lambda: None,
    quantized: QuickSilverForCausalLM | None = None,
) -> tuple[list[list[dict[str, Any]]], Path]:
    """Evaluate one model, write `NAME.json` and `NAME.png` into `folder`; return the parts' results and the picture.

    `quantized` is the model with any-precision weights, for plans that choose bits.
    """
    results = [
        evaluate(model, part.plans, part.text, part.window_config, "score", name, on_window, quantized)
        for part in measured
    ]
    token_ids = measured[0].text.windows[0].token_ids
    tokens = [tokenizer.decode([token]) for token in token_ids]
    halting, depths = stopping(model, shallowest(results[0]), token_ids)
    fusing, fused = measured[1].plans[0], token_depths(model, measured[1].plans[0], token_ids, True)
    panels = [
        TokenPanel(f"layers each token ran under plan '{plan.name}'{where}", tokens, ran)
        for plan, ran, where in (
            (halting, depths, ""),
            (fusing, fused, ", as a prompt: dark tokens were absorbed by the next"),
        )
    ]
    picture = folder / f"{name}.png"
    draw_summary(picture, [row for rows in results for row in rows], panels)
    write_atomically(folder / f"{name}.json", json.dumps([row for rows in results for row in rows], indent=2) + "\n")
    return results, picture
