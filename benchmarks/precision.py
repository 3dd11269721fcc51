"""Precision rules against the float model: what uniform, entropy and channel bits cost and save.

Thresholds are fitted on calibration text; figures come from other text. Timing is not its subject: the plain PyTorch
path expands weights before it multiplies.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.sweep import heading, interval, read_corpus, show_dot, text_options, write_results
from quicksilver.calibrate.bits import fit
from quicksilver.calibrate.hessians import collect_hessians
from quicksilver.errors import QuickSilverError
from quicksilver.families.quantize import quantize_model
from quicksilver.loading.load import accelerate, load, load_tokenizer
from quicksilver.measure.report import build_rows
from quicksilver.measure.scoring import run_windows
from quicksilver.measure.windows import WindowConfig, cut, default_bos
from quicksilver.plan import Plan
from quicksilver.rules import (
    ChannelBitsRule,
    EntropyBitsRule,
    PrecisionConfig,
    PrecisionRule,
    UniformBitsRule,
)
from quicksilver.runtime.loop import Decoder
from quicksilver.weights.codes import GROUP_SIZES
from quicksilver.weights.config import QuantizationConfig

BUDGETS = (0.010, 0.036)
MEANS = (6.0, 5.2, 4.5, 4.0)
FINE, FINE_SKIPPING = (8, 6, 4, 2), (8, 6, 4, 2, 0)
COARSE_SKIPPING = (8, 4, 2, 0)
ENTROPY_SHARES = ((0.25, 0.5, 0.25), (0.5, 0.5, 0.0), (0.9, 0.1, 0.0))  # of 8, 4 and 2 bits
COLUMNS = (8, 6, 4, 2, 0)
PROTECT_FIRST = 4  # and special tokens, under every rule but uniform ones


def wanted() -> Iterator[tuple[str, PrecisionRule]]:
    """Yield the plans compared, by name; those with a target are still to be fitted."""
    for bits in (8, 6, 4, 2):
        yield f"uniform {bits}", UniformBitsRule(bits)
    for over in ("head", "hidden"):
        for shares in ENTROPY_SHARES:
            label = "/".join(f"{share:.0%}" for share in shares)
            yield f"entropy ({over}) {label}", EntropyBitsRule(over=over, target=shares)
    for mean in MEANS:
        yield f"channel, skipping {mean}", ChannelBitsRule(bits=FINE_SKIPPING, target=mean)
        yield f"channel {mean}", ChannelBitsRule(bits=FINE, target=mean)
        yield f"channel, 8/4/2/0 {mean}", ChannelBitsRule(bits=COARSE_SKIPPING, target=mean)


def quantized_copy(model: Any, windows: Sequence[Tensor], config: QuantizationConfig) -> Any:
    """Return the model with any-precision weights, its codes compensated on the windows."""
    plain = copy.deepcopy(model.model)
    quantize_model(plain, config, collect_hessians(plain, [window.tolist() for window in windows], head=config.head))
    return accelerate(plain, "dense", model.special_ids)


def plans_for(quantized: Any, windows: Sequence[Tensor]) -> list[Plan]:
    """Return the plans, fitted on the windows."""
    plans = []
    for name, rule in wanted():
        protect = 0 if isinstance(rule, UniformBitsRule) else PROTECT_FIRST
        plan = Plan(name, precision=PrecisionConfig(rule, protect_first=protect, protect_special=protect > 0))
        plans.append(fit(quantized.adapter, plan, windows, special_ids=quantized.special_ids))
        print("f", end="", file=sys.stderr, flush=True)
    return plans


def settings(config: QuantizationConfig, name: str, windows: Sequence[Tensor], fitted: Sequence[Tensor]) -> str:
    """Return in words what plans were made with: windows to choose codes by, and those that bits are fitted to."""
    return (
        f"weights quantized in groups of {config.group_size}, {'head too (8 bits), ' if config.head else ''}"
        f"error-compensated; calibration {name}, {sum(map(len, windows))} tokens for codes, the first"
        f" {sum(map(len, fitted))} of them for thresholds;"
        f" the first {PROTECT_FIRST} tokens and special ones read 8 bits, but for uniform bits"
    )


def against(baseline: dict[str, Any], row: dict[str, Any], key: str) -> float:
    """Return the share of a cost that a row saves against uniform 8 bits."""
    return 1.0 - row["accelerated"][f"{key}_per_token"] / baseline["accelerated"][f"{key}_per_token"]


def best(rows: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """Return the row that saves the most bitops with the upper end of its interval inside the budget, if any."""
    inside = [row for row in rows if (row["delta"]["nll_ci95"] or [0.0, row["delta"]["nll"]])[1] <= budget]
    return min(inside, key=lambda row: row["accelerated"]["bitops_per_token"], default=None)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a run, the settings above it and the best plans below it."""
    first = rows[0]
    lines = [
        *heading(first, f"; {first['nesting']}"),
        f"| policy | bits read | {' | '.join(map(str, COLUMNS))} | Δnll [95 % CI] | Δppl | KL | top-1"
        " | FLOPs saved | body | bitops saved | weight bytes saved | bitops saved against float |",
        "|---" * 16 + "|",
        *(_table_row(first, row) for row in rows),
        "",
    ]
    for budget in BUDGETS:
        row = best(rows, budget)
        found = "none" if row is None else f"**{row['plan']['name']}**, {interval(row['delta'])}"
        lines.append(f"Most bitops saved with the whole interval inside +{budget:.3f} nats: {found}.\n")
    return "\n".join(lines)


def _table_row(first: dict[str, Any], row: dict[str, Any]) -> str:
    side, delta = row["accelerated"], row["delta"]
    shares = " | ".join(f"{side['width_histogram'].get(str(bits), 0.0):.1%}" for bits in COLUMNS)
    saved = " | ".join(f"{against(first, row, key):+.1%}" for key in ("flops", "flops_body", "bitops", "weight_bytes"))
    return (
        f"| {row['plan']['name']} | {side['mean_bits']:.2f} | {shares} | {interval(delta)} | {delta['ppl']:+.3f}"
        f" | {delta['kl']:.4f} | {delta['top1_agreement']:.1%} | {saved} | {delta['bitops_reduction']:+.1%} |"
    )


@click.command()
@click.argument("model")
@text_options
@click.option("--group-size", type=click.Choice(GROUP_SIZES), default=GROUP_SIZES[0], show_default=True)
@click.option("--context", default=512, show_default=True)
@click.option("--max-tokens", default=10_000, show_default=True)
@click.option("--calibration-tokens", default=8192, show_default=True, help="For codes; thresholds take half of them.")
@click.option("-o", "--output", required=True, help="Results: OUTPUT.json and OUTPUT.md.")
def main(
    model: str,
    text: str | None,
    documents: str | None,
    calibration_text: str | None,
    calibration_documents: str | None,
    group_size: int,
    context: int,
    max_tokens: int,
    calibration_tokens: int,
    output: str,
) -> None:
    """Compare precision rules on MODEL, its weights and head quantized, with the float model.

    \b
    Example:
      python -m benchmarks.precision ref-llama --text test.txt --calibration-text holdout.txt -o precision
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
        bos_id = default_bos(tokenizer)
        window_config = WindowConfig(context, context // 2, bos_id, max_tokens)
        measured = cut(read_corpus(text, documents), tokenizer, window_config)
        held = read_corpus(calibration_text, calibration_documents)
        calibration = cut(held, tokenizer, WindowConfig(context, window_config.room, bos_id, calibration_tokens))
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    windows = [torch.tensor(window.token_ids) for window in calibration.windows]
    config = QuantizationConfig(group_size=group_size, method="compensated", embeddings=False)
    quantized = quantized_copy(loaded, windows, config)
    fitted = windows[: max(len(windows) // 2, 1)]
    plans = plans_for(quantized, fitted)
    decoders = [Decoder(loaded.adapter, Plan.dense())]
    decoders += [Decoder(quantized.adapter, plan, quantized.special_ids) for plan in plans]
    records = run_windows(decoders, measured.windows, "score", show_dot)
    rows = build_rows(records, measured, window_config, "score", Path(model).name)
    rows = [{**row, "nesting": settings(config, held.name, windows, fitted)} for row in rows]
    write_results(output, rows, markdown(rows))


if __name__ == "__main__":
    main()
