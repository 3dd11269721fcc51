"""What sweeps over plans share: numbers found on calibration text, the random control, texts and tables.

Which plans are tried, and what counts as the share of the work that one saves, is each sweep's own.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from quicksilver.core.files import write_atomically
from quicksilver.measure.scoring import EngineRecord
from quicksilver.measure.statistics import paired_delta
from quicksilver.measure.texts import Corpus, read_documents, read_text

CONTROL = "random"
BISECTIONS = 20
CLOSE = 0.03  # of the share asked for

_TEXT_OPTIONS = (
    click.option("--text", help="One long text to measure on."),
    click.option("--documents", help="JSON lines to measure on."),
    click.option("--calibration-text", help="One long text to find thresholds on; never the one measured on."),
    click.option("--calibration-documents", help="JSON lines to find thresholds on."),
)


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a text to measure on and one to calibrate on."""
    for option in reversed(_TEXT_OPTIONS):
        command = option(command)
    return command


def read_corpus(text: str | None, documents: str | None) -> Corpus:
    """Read the one of the two that is given.

    Raises:
        UsageError: both are given, or neither.
        InputError: the file cannot be used.
    """
    if text is not None and documents is None:
        return read_text(text)
    if documents is not None and text is None:
        return read_documents(documents)
    raise click.UsageError("give a text or documents, for measuring and for calibration")


def geometric(low: float, high: float) -> float:
    """Return the geometric mean: for thresholds that differ by orders of magnitude between models."""
    return math.sqrt(low * high)


def arithmetic(low: float, high: float) -> float:
    """Return the mean: for numbers of a bounded range."""
    return (low + high) / 2


def bisect(
    share_at: Callable[[float], float],
    low: float,
    high: float,
    share: float,
    middle: Callable[[float, float], float] = geometric,
) -> float | None:
    """Return a number at which the share saved is the one asked for, to CLOSE, or None where none is found.

    Args:
        share_at: the share saved at a number, which grows from `low` to `high`.
        low: where it is least; may be the larger of the two.
        high: where it is most.
        share: asked for.
        middle: what lies halfway between two numbers.
    """
    if share_at(high) < (1 - CLOSE) * share:
        return None
    for _ in range(BISECTIONS):
        number = middle(low, high)
        got = share_at(number)
        if abs(got - share) <= CLOSE * share:
            return number
        low, high = (number, high) if got < share else (low, number)
    return None


def against_random(
    records: Sequence[EngineRecord], shares: Sequence[float], counts: Sequence[int]
) -> list[dict[str, Any] | None]:
    """Return each plan's loss minus that of random choice at the same share, all else equal, with its interval.

    A plan's name is "signal/variant": it is compared with CONTROL of the same variant. Between two shares at which
    that was measured, each window's loss is interpolated linearly. None for the controls themselves, and outside
    the range measured.

    Args:
        records: the dense engine's, then each plan's.
        shares: what each plan really saved.
        counts: tokens scored in each window.
    """
    names = [record.decoder.plan.name.partition("/") for record in records[1:]]
    curves: dict[str, list[tuple[float, list[float]]]] = defaultdict(lambda: [(0.0, records[0].nll)])
    for (signal, _, variant), share, record in zip(names, shares, records[1:], strict=True):
        if signal == CONTROL:
            curves[variant].append((share, record.nll))
    rows: list[dict[str, Any] | None] = []
    for (signal, _, variant), share, record in zip(names, shares, records[1:], strict=True):
        curve = sorted(curves[variant], key=lambda point: point[0])
        if signal == CONTROL or not 0.0 < share <= curve[-1][0]:
            rows.append(None)
            continue
        above = next(i for i, point in enumerate(curve) if point[0] >= share)
        (low, low_nll), (high, high_nll) = curve[above - 1], curve[above]
        weight = (share - low) / (high - low)
        control = [(1 - weight) * x + weight * y for x, y in zip(low_nll, high_nll, strict=True)]
        delta = paired_delta(control, record.nll, counts)
        rows.append({"nll": delta.nll, "nll_ci95": delta.nll_ci95 and list(delta.nll_ci95)})
    return rows


def heading(row: dict[str, Any], more: str = "") -> list[str]:
    """Return the lines above a table: what was run, on what, and how; `more` is added to the settings."""
    model, protocol, env = row["model"], row["protocol"], row["environment"]
    return [
        f"### {model['name']} on {protocol['text']}",
        "",
        f"`{env['command']}`",
        "",
        f"{model['family']}, {model['layers']} layers, {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']};"
        f" dense {row['dense']['nll']:.4f} nats, perplexity {row['dense']['ppl']:.2f},"
        f" {row['dense']['bits_per_byte']:.3f} bits per byte; {row['tokens_scored']} tokens scored, context"
        f" {protocol['context']}, stride {protocol['stride']}, BOS {'yes' if protocol['bos'] else 'no'},"
        f" mode {protocol['mode']}{more}. {machine(env)}",
        "",
    ]


def machine(environment: dict[str, Any]) -> str:
    """Return versions, processor and threads of a run, as a sentence."""
    return (
        f"quicksilver {environment['quicksilver']}, torch {environment['torch']}, transformers"
        f" {environment['transformers']}, {environment['cpu']}, {environment['threads']} thread(s)."
    )


def interval(delta: dict[str, Any]) -> str:
    """Return a difference of losses with its interval, as a table's cell."""
    bounds = delta["nll_ci95"]
    return f"{delta['nll']:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")


def show_dot() -> None:
    """Show on stderr that a window is done."""
    print(".", end="", file=sys.stderr, flush=True)


def write_results(output: str, rows: Sequence[dict[str, Any]], markdown: str) -> None:
    """Write OUTPUT.json and OUTPUT.md; the folder is made if it is missing, so that no finished run is lost."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(f"{output}.json"), json.dumps(list(rows), indent=1) + "\n")
    write_atomically(Path(f"{output}.md"), markdown)
