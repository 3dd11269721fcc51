"""Calibrated plans on text that neither they nor their verification have seen: what they lose and save, one table.

The plans are those that `quicksilver calibrate` wrote; thresholds are theirs, nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.sweep import heading, interval, read_corpus, show_dot, write_results
from quicksilver.calibrate.scoring import Scorer
from quicksilver.calibrate.splits import Part
from quicksilver.cli.recipes import quantized_copy
from quicksilver.errors import QuickSilverError
from quicksilver.loading.load import load, load_tokenizer
from quicksilver.measure.windows import WindowConfig, cut, default_bos
from quicksilver.plan import Plan
from quicksilver.weights.linear import keeping_expanded

_COLUMNS = (
    ("flops_reduction", "FLOPs"),
    ("flops_body_reduction", "in the layers"),
    ("bitops_reduction_8bit", "bitops"),
    ("weight_bytes_reduction_8bit", "weight bytes"),
    ("kv_used_bytes_reduction", "cache bytes"),
    ("kv_read_bytes_reduction", "cache bytes read"),
)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a run, with its settings above it."""
    lines = [
        *heading(rows[0]),
        f"| plan | Δnll [95 % CI] | Δppl | KL | top-1 | {' | '.join(label for _, label in _COLUMNS)}"
        " | bits read | channels skipped | scores computed | values read | layers |",
        "|---" * (len(_COLUMNS) + 10) + "|",
        *(_table_row(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def _table_row(row: dict[str, Any]) -> str:
    side, delta = row["accelerated"], row["delta"]
    saved = " | ".join(f"{delta[key]:+.1%}" for key, _ in _COLUMNS)
    return (
        f"| {row['plan']['name']} | {interval(delta)} | {delta['ppl']:+.3f} | {delta['kl']:.4f}"
        f" | {delta['top1_agreement']:.1%} | {saved} | {side['mean_bits']:.2f}"
        f" | {side['width_histogram'].get('0', 0.0):.1%} | {side['query_components_read']:.1%}"
        f" | {side['values_read']:.1%} | {side['mean_depth']:.2f} |"
    )


@click.command()
@click.argument("model")
@click.option("--plan", "plans", multiple=True, required=True, help="A plan file, or NAME=FILE; may be repeated.")
@click.option("--text", type=click.Path(), help="One long UTF-8 text.")
@click.option("--documents", type=click.Path(), help='JSON lines with a "text" field.')
@click.option("--max-tokens", default=40_000, show_default=True)
@click.option("--context", type=int, help="Tokens of a window (default: the model's, at most 2048).")
@click.option("-o", "--output", required=True, help="Results: OUTPUT.json and OUTPUT.md.")
def main(
    model: str,
    plans: tuple[str, ...],
    text: str | None,
    documents: str | None,
    max_tokens: int,
    context: int | None,
    output: str,
) -> None:
    """Measure calibrated plans on MODEL against the dense model, bits and weight bytes against 8 bits throughout.

    \b
    Example:
      python -m benchmarks.calibrated ref-llama --plan mild=mild.json --text test.txt -o calibrated
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
        context = context or min(loaded.adapter.spec.max_positions, 2048)
        window_config = WindowConfig(context, context // 2, default_bos(tokenizer), max_tokens)
        measured = cut(read_corpus(text, documents), tokenizer, window_config)
        given = [_read(plan) for plan in plans]
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    runner = quantized_copy(loaded) if any(plan.precision is not None for plan in given) else loaded
    part = Part(measured, ((measured.name, len(measured.windows)),))
    scorer = Scorer(loaded, runner, part, window_config, Path(model).name)
    with keeping_expanded(runner.model):
        rows = [row for plan in given if (row := scorer.score(plan, on_window=show_dot)) is not None]
    write_results(output, rows, markdown(rows))


def _read(given: str) -> Plan:
    name, _, path = given.rpartition("=")
    plan = Plan.load(path)
    return plan.renamed(name) if name else plan


if __name__ == "__main__":
    main()
