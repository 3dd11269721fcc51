"""The demonstration: measure the embedded models on the embedded articles, generate a sample, draw it all.

Everything it reads comes with the package; nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quicksilver.core.files import write_atomically
from quicksilver.core.plan import Plan
from quicksilver.measure.picture import draw_summary
from quicksilver.measure.report import evaluate
from quicksilver.measure.texts import Corpus
from quicksilver.measure.windows import Protocol, WindowedText, cut, default_bos
from quicksilver.runtime.decoder import Decoder
from quicksilver.runtime.generation import QuickSilverForCausalLM
from quicksilver.runtime.stats import RunStats

ARTICLES = Path(__file__).parent.parent / "data" / "demo"
PLANS = ("paper", "relative", "settled")
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


def demo_windows(tokenizer: Any, max_positions: int, max_tokens: int) -> tuple[Protocol, WindowedText]:
    """Cut the embedded articles for a model."""
    context = min(max_positions, 512)
    protocol = Protocol(context, context // 2, default_bos(tokenizer), max_tokens)
    return protocol, cut(demo_corpus(), tokenizer, protocol)


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


def shallowest(results: Sequence[dict[str, Any]], plans: Sequence[Plan]) -> Plan:
    """Return the plan that ran the fewest layers per token."""
    name = min(results, key=lambda result: result["accelerated"]["mean_depth"])["plan"]["name"]
    return next(plan for plan in plans if plan.name == name)


def token_depths(model: QuickSilverForCausalLM, plan: Plan, token_ids: Sequence[int]) -> list[int]:
    """Return how many layers each token of one sequence ran under a plan."""
    decoder = Decoder(model.adapter, plan, model.special_ids)
    trace = decoder.new_trace(per_token=True)
    decoder.run(torch.tensor(token_ids, device=model.device), [len(token_ids)], decoder.new_cache(1), trace)
    return trace.depths[0].tolist()


def run(
    model: QuickSilverForCausalLM,
    tokenizer: Any,
    name: str,
    plans: Sequence[Plan],
    text: tuple[Protocol, WindowedText],
    folder: Path,
    on_window: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], Path]:
    """Evaluate one model, write `NAME.json` and `NAME.png` into `folder`, return the results and the picture."""
    protocol, windowed = text
    results = evaluate(model, plans, windowed, protocol, "score", name, on_window)
    shown = shallowest(results, plans)
    token_ids = windowed.windows[0].token_ids
    picture = folder / f"{name}.png"
    tokens = [tokenizer.decode([token]) for token in token_ids]
    draw_summary(picture, results, shown.name, tokens, token_depths(model, shown, token_ids))
    write_atomically(folder / f"{name}.json", json.dumps(results, indent=2) + "\n")
    return results, picture
