"""Halting signals and KV fills at matched mean depth, against halting at random.

Thresholds are found on calibration text, by bisection for the share of layers saved; figures come from other
text, where a threshold may save more or less: random halting is measured at several shares, and each plan is
compared with it at the share the plan really saved. Timing is not its subject.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.sweep import (
    CONTROL,
    against_random,
    bisect,
    heading,
    interval,
    read_corpus,
    show_dot,
    text_options,
    write_results,
)
from quicksilver import rules
from quicksilver.core.trace import Trace
from quicksilver.errors import QuickSilverError
from quicksilver.loading.load import load, load_tokenizer
from quicksilver.measure.report import build_rows
from quicksilver.measure.scoring import run_windows
from quicksilver.measure.windows import Window, WindowConfig, cut, default_bos
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder

MIN_LAYER = 0.5
RANDOM_SHARES = (0.01, 0.02, 0.035, 0.06, 0.1, 0.15)
FILLS: dict[str, rules.FillRule] = {
    "drop": rules.DropFill(),
    "zero": rules.ZeroFill(),
    "propagate": rules.PropagateFill(),
}


@dataclass(frozen=True)
class Signal:
    """A family of rules indexed by one number, and the range in which to look for it."""

    rule: Callable[[float], rules.HaltingRule]
    low: float
    high: float


SIGNALS = {
    CONTROL: Signal(lambda p: rules.RandomRule(p, seed=1), 1e-4, 1.0),
    "drift": Signal(rules.DriftRule, 1e-3, 1e4),
    "relative": Signal(rules.RelativeDriftRule, 1e-3, 2.0),
    "fixed_point": Signal(lambda t: rules.FixedPointRule(t, min_cosine=0.0), 1e-3, 2.0),
    "entropy": Signal(rules.EntropyRule, 1e-3, 16.0),
    "drift+entropy": Signal(lambda t: rules.AllRule((rules.DriftRule(t), rules.EntropyRule(1.15))), 1e-3, 1e4),
}


def plan_for(signal: str, fill: str, number: float) -> Plan:
    """Return the plan of a signal's rule at a threshold, with a fill."""
    rule = SIGNALS[signal].rule(number)
    return Plan(f"{signal}/{fill}", rules.HaltingConfig(rule, min_layer=MIN_LAYER), rules.KVConfig(FILLS[fill]))


def saved_share(model: Any, plan: Plan, windows: Sequence[Window]) -> float:
    """Return the share of token-layers that a plan does not run."""
    decoder = Decoder(model.adapter, plan, model.special_ids)
    trace = decoder.new_trace()
    for window in windows:
        decoder.run(torch.tensor(window.token_ids), [len(window.token_ids)], decoder.new_cache(1), trace)
    return saved(decoder, trace)


def saved(decoder: Decoder, trace: Trace) -> float:
    """Return the share of token-layers that a traced run did not run."""
    return 1.0 - trace.mean_depth / decoder.spec.num_layers


def match(model: Any, signal: str, fill: str, share: float, windows: Sequence[Window]) -> Plan | None:
    """Return the plan that saves `share` of the layers on the calibration windows, or None if none does."""
    rule = SIGNALS[signal]
    number = bisect(lambda x: saved_share(model, plan_for(signal, fill, x), windows), rule.low, rule.high, share)
    return None if number is None else plan_for(signal, fill, number)


def find_plans(model: Any, shares: Sequence[float], windows: Sequence[Window]) -> list[tuple[float, Plan]]:
    """Return every signal x fill x share that can be matched, with the share asked for."""
    found = []
    for signal in SIGNALS:
        for share in RANDOM_SHARES if signal == CONTROL else shares:
            for fill in FILLS:
                plan = match(model, signal, fill, share, windows)
                print(f"{share:.1%} {signal}/{fill}: {'not reachable' if plan is None else 'matched'}", file=sys.stderr)
                if plan is not None:
                    found.append((share, plan))
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a run, the settings above it."""
    lines = [
        *heading(rows[0]),
        "| layers saved: asked | got | signal | KV fill | threshold | Δnll [95 % CI] | Δppl | KL | top-1 | FLOPs"
        " | KV bytes | Δnll against random at the share got [95 % CI] |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_table_row(row) for row in rows]) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    delta, control = row["delta"], row["against_random"]
    signal, _, fill = row["plan"]["name"].partition("/")
    asked = "" if row["share"] is None else f"{row['share']:.0%}"
    got = 1.0 - row["accelerated"]["mean_depth"] / row["model"]["layers"]
    versus = "" if control is None else interval(control)
    return (
        f"| {asked} | {got:.1%} | {signal} | {fill} | {_threshold(row)} | {interval(delta)} | {delta['ppl']:+.3f}"
        f" | {delta['kl']:.4f} | {delta['top1_agreement']:.1%} | {-delta['flops_reduction']:+.1%}"
        f" | {-delta['kv_bytes_reduction']:+.1%} | {versus} |"
    )


def _threshold(row: dict[str, Any]) -> str:
    """Return the number that the bisection found, as it stands in the plan."""
    rule = row["plan"]["halting"]["rule"]
    if row["share"] is None:
        return ""
    rule = rule["rules"][0] if "rules" in rule else rule
    return f"{rule.get('threshold', rule.get('probability')):.4g}"


@click.command()
@click.argument("model")
@text_options
@click.option("--saved", "shares", multiple=True, type=float, default=(0.03, 0.1), show_default=True)
@click.option("--context", default=512, show_default=True)
@click.option("--max-tokens", default=10_000, show_default=True)
@click.option("--calibration-tokens", default=4096, show_default=True)
@click.option("-o", "--output", required=True, help="Results: OUTPUT.json and OUTPUT.md.")
def main(
    model: str,
    text: str | None,
    documents: str | None,
    calibration_text: str | None,
    calibration_documents: str | None,
    shares: tuple[float, ...],
    context: int,
    max_tokens: int,
    calibration_tokens: int,
    output: str,
) -> None:
    """Compare halting signals and KV fills on MODEL at matched mean depth.

    \b
    Example:
      python -m benchmarks.signals ref-llama --text test.txt --calibration-text holdout.txt -o signals
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
        window_config = WindowConfig(context, context // 2, default_bos(tokenizer), max_tokens)
        calibration = WindowConfig(context, window_config.stride, window_config.bos_id, calibration_tokens)
        measured = cut(read_corpus(text, documents), tokenizer, window_config)
        fitted = cut(read_corpus(calibration_text, calibration_documents), tokenizer, calibration)
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    found = [(None, Plan.preset("paper")), *find_plans(loaded, shares, fitted.windows)]
    decoders = [Decoder(loaded.adapter, plan, loaded.special_ids) for plan in (Plan.dense(), *(p for _, p in found))]
    records = run_windows(decoders, measured.windows, "score", show_dot)
    rows = build_rows(records, measured, window_config, "score", Path(model).name)
    counts = [window.num_scored for window in measured.windows]
    controls = against_random(records, [saved(r.decoder, r.trace) for r in records[1:]], counts)
    for row, (share, _), control in zip(rows, found, controls, strict=True):
        row.update(share=share, calibration=fitted.name, against_random=control)
    write_results(output, rows, markdown(rows))


if __name__ == "__main__":
    main()
