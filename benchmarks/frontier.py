"""What a calibration tried and chose, as a section of a results page: from the PLAN.frontier.json that it wrote.

Nothing is measured here, and nothing is chosen: which plan held is what the file says.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from benchmarks.sweep import interval, machine
from quicksilver.calibrate.scoring import Budget

_GROUPS = {
    "together": "all together",
    "channels": "precision: channels skipped",
    "skipping": "kv: keys and values left out",
    "entries": "kv: keys and values in 8 bits",
    "shortcuts": "halting: sublayer shortcuts",
    "halting": "halting: whole tokens, fitted gate",
    "fusion": "fusion",
    "exit": "static exit (every token, least loss)",
    "paper": "paper, thresholds tuned",
    "paper, as published": "paper, as published",
}
_SAVED = (
    "flops_reduction",
    "flops_body_reduction",
    "bitops_reduction_8bit",
    "weight_bytes_reduction_8bit",
    "kv_used_bytes_reduction",
)


def markdown(found: dict[str, Any]) -> str:
    """Return a calibration's table, its command above it and what did not hold below."""
    parts, window_config = found["parts"], found["protocol"]
    budget, held, not_held = found["budget"], found["verification"]["held"], found["verification"]["failed"]
    unit = "nats" if budget["unit"] == "nll" else "perplexity"
    lines = [
        f"### {found['model']}, +{budget['limit']:.3f} {unit}",
        "",
        f"`{found['command']}`",
        "",
        f"dense {found['candidates'][0]['dense_bits_per_byte']:.3f} bits per byte on the searched part"
        f"{_held_dense(held)};"
        f" {parts['fit_tokens']} tokens to fit, {parts['search_tokens']} scored in the search,"
        f" {parts['held_out_tokens']} held out; context {window_config['context']}, stride {window_config['stride']}."
        f" {machine(found['environment'])}",
        "",
        "| on the searched part, upper end inside the budget | Δnll [95 % CI] | FLOPs | in the layers | bitops"
        " | weight bytes | cache bytes | layers |",
        "|---" * 8 + "|",
        *filter(None, (_of_group(found, group, label) for group, label in _GROUPS.items())),
        *(_row(f"chosen, without {each['without']}", each, each) for each in found["leave_one_out"]),
    ]
    if held is not None:
        figures = held["delta"] | {"mean_depth": held["accelerated"]["mean_depth"]}
        lines.append(_row("**chosen, on held-out text**", held, figures))
    else:
        lines.append("\nNo plan held on the held-out text: dense was written.")
    failed = [_failed(row, budget["unit"]) for row in not_held]
    if failed:
        lines += ["", f"Tried before and not held there: {', '.join(failed)}."]
    return "\n".join(lines) + "\n"


def _held_dense(held: dict[str, Any] | None) -> str:
    return "" if held is None else f" and {held['dense']['bits_per_byte']:.3f} on the held-out one"


def _failed(row: dict[str, Any], unit: str) -> str:
    """Return what a plan saved and lost that did not hold, on the text where its interval ends highest."""
    ends = {name: (delta[f"{unit}_ci95"] or (0.0, math.inf))[1] for name, delta in row["delta_by_text"].items()}
    text = max(ends, key=ends.__getitem__)
    lost = interval(row["delta_by_text"][text])
    return f"{_percent(row['delta']['flops_body_reduction'])} in the layers at {lost} on {text}"


def _of_group(found: dict[str, Any], group: str, label: str) -> str | None:
    """Return the row of a group's candidate that saves most inside the budget; else of the one that loses least."""
    of_group = [each for each in found["candidates"] if each["group"] == group]
    if not of_group:
        return None
    inside = [each for each in of_group if Budget(**found["budget"]).holds(each)]
    if inside:
        best = max(inside, key=lambda each: each["saved"])
        return _row(label, best, best)
    best = min(of_group, key=lambda each: each["delta"]["nll"])
    return _row(f"{label} (outside the budget)", best, best)


def _row(label: str, scored: dict[str, Any], figures: dict[str, Any]) -> str:
    saved = " | ".join(_percent(figures[name]) for name in _SAVED)
    return f"| {label} | {interval(scored['delta'])} | {saved} | {figures['mean_depth']:.2f} |"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


@click.command()
@click.argument("frontiers", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(frontiers: tuple[Path, ...]) -> None:
    """Print the section of each PLAN.frontier.json.

    \b
    Example:
      python -m benchmarks.frontier strong.frontier.json mild.frontier.json
    """
    for path in frontiers:
        click.echo(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
