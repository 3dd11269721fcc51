"""The demonstration: measure the embedded models on the embedded articles, generate a sample, draw it all."""

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


def sample(model: QuickSilverForCausalLM, tokenizer: Any, plan: Plan, max_new_tokens: int = 40) -> tuple[str, RunStats]:
    """Continue the demonstration's prompt greedily under a plan; return the text and what it ran."""
    limit = model.adapter.spec.max_positions
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, : limit // 2]
    model.plan = plan
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, limit - ids.shape[1]),
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True), model.stats


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
    """Return a plan, `first` or a looser `relative`, under which some tokens stop early, and the layers each ran."""
    relative = Plan.preset("relative")
    assert relative.halting is not None
    plan, depths = first, token_depths(model, first, token_ids, False)
    for limit in LOOSER:
        if sum(depth < model.adapter.spec.num_layers for depth in depths) >= STOPPED * len(depths):
            break
        halting = replace(relative.halting, rule=RelativeDriftRule(limit))
        plan = replace(relative, name=f"relative, threshold {limit:g}", halting=halting)
        depths = token_depths(model, plan, token_ids, False)
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
    """Evaluate one model, write `NAME.json` and `NAME.png` into `folder`; return the parts' results and the picture."""
    results = [
        evaluate(model, part.plans, part.text, part.window_config, "score", name, on_window, quantized)
        for part in measured
    ]
    token_ids, fusing = measured[0].text.windows[0].token_ids, measured[1].plans[0]
    tokens = [tokenizer.decode([token]) for token in token_ids]
    halting, depths = stopping(model, shallowest(results[0]), token_ids)
    title, absorbed = "layers each token ran under plan", "as a prompt: dark tokens were absorbed by the next"
    panels = [
        TokenPanel(f"{title} '{halting.name}'", tokens, depths),
        TokenPanel(f"{title} '{fusing.name}', {absorbed}", tokens, token_depths(model, fusing, token_ids, True)),
    ]
    rows = [row for rows in results for row in rows]
    picture = folder / f"{name}.png"
    draw_summary(picture, rows, panels)
    write_atomically(folder / f"{name}.json", json.dumps(rows, indent=2) + "\n")
    return results, picture
