"""What a calibration tried and chose, as a section of a results page: from the PLAN.frontier.json that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_GROUPS = {
    "together": "all together",
    "channels": "precision: channels skipped",
    "values": "kv: values unread",
    "queries": "kv: components of queries left out",
    "screening": "kv: keys screened",
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
    parts, protocol, environment = found["parts"], found["protocol"], found["environment"]
    budget, verification = found["budget"], found["verification"]
    unit = "nats" if budget["unit"] == "nll" else "perplexity"
    lines = [
        f"### {found['model']}, +{budget['limit']:.3f} {unit}",
        "",
        f"`{found['command']}`",
        "",
        f"dense {found['candidates'][0]['dense_bits_per_byte']:.3f} bits per byte on the searched part;"
        f" {parts['fit_tokens']} tokens to fit, {parts['search_tokens']} scored in the search,"
        f" {parts['held_out_tokens']} held out; context {protocol['context']}, stride {protocol['stride']}."
        f" quicksilver {environment['quicksilver']}, torch {environment['torch']}, transformers"
        f" {environment['transformers']}, {environment['cpu']}, {environment['threads']} thread(s).",
        "",
        "| on the searched part, upper end inside the budget | Δnll [95 % CI] | FLOPs | in the layers | bitops"
        " | weight bytes | cache bytes | layers |",
        "|---" * 8 + "|",
        *(_of_group(found, group, label) for group, label in _GROUPS.items()),
        *(_row(f"chosen, without {each['without']}", each, each) for each in found["leave_one_out"]),
    ]
    held = verification["held"]
    if held is not None:
        figures = held["delta"] | {"mean_depth": held["accelerated"]["mean_depth"]}
        lines.append(_row("**chosen, on held-out text**", held, figures))
    failed = [
        f"{_percent(row['delta']['flops_body_reduction'])} in the layers at {_loss(row)}"
        for row in verification["failed"]
    ]
    if failed:
        lines += ["", f"Tried before and not held there: {', '.join(failed)}."]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _of_group(found: dict[str, Any], group: str, label: str) -> str | None:
    """Return the row of a group's candidate that saves most inside the budget; else of the one that loses least."""
    of_group = [each for each in found["candidates"] if each["group"] == group]
    if not of_group:
        return None
    inside = [each for each in of_group if _holds(each, found["budget"])]
    if inside:
        best = max(inside, key=lambda each: each["saved"])
        return _row(label, best, best)
    best = min(of_group, key=lambda each: each["delta"]["nll"])
    return _row(f"{label} (outside the budget)", best, best)


def _holds(scored: dict[str, Any], budget: dict[str, Any]) -> bool:
    """Whether the upper end of the interval is inside the budget, on all text and on each."""
    deltas = (scored["delta"], *scored["delta_by_text"].values())
    return all(delta[f"{budget['unit']}_ci95"][1] <= budget["limit"] for delta in deltas)


def _row(label: str, scored: dict[str, Any], figures: dict[str, Any]) -> str:
    saved = " | ".join(_percent(figures[name]) for name in _SAVED)
    return f"| {label} | {_loss(scored)} | {saved} | {figures['mean_depth']:.2f} |"


def _loss(scored: dict[str, Any]) -> str:
    delta = scored["delta"]
    return f"{delta['nll']:+.4f} [{delta['nll_ci95'][0]:+.4f}, {delta['nll_ci95'][1]:+.4f}]"


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
