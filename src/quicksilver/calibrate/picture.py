"""Pictures of a frontier: what candidates saved of each objective against what they lost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quicksilver.core.files import write_atomically

_SHOWN = (
    ("flops_reduction", "FLOPs saved, head included"),
    ("flops_body_reduction", "FLOPs saved in the layers"),
    ("bitops_reduction_8bit", "bit operations saved against 8 bits throughout"),
    ("weight_bytes_reduction_8bit", "weight bytes saved against 8 bits throughout"),
    ("kv_used_bytes_reduction", "cache bytes saved"),
)
_MARKERS = {
    "together": ("o", "tab:blue"),
    "channels": ("s", "tab:orange"),
    "values": ("^", "tab:green"),
    "shortcuts": ("D", "tab:red"),
    "halting": ("v", "tab:purple"),
    "fusion": ("P", "tab:brown"),
    "exit": ("X", "0.35"),
    "paper": ("*", "tab:pink"),
    "paper, as published": ("*", "tab:cyan"),
}
_NAMES = {
    "together": "all together",
    "channels": "precision alone",
    "values": "values unread alone",
    "shortcuts": "shortcuts alone",
    "halting": "halting alone",
    "fusion": "fusion alone",
    "exit": "every token exits at one layer",
    "paper": "paper, thresholds tuned",
}


def draw(path: Path, found: dict[str, Any]) -> list[Path]:
    """Write a frontier as PNG and as SVG.

    Args:
        path: without its ending; an interrupted write leaves nothing there.
        found: as `report.frontier` gave it.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2 * 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2).flatten()
    for each, (key, label) in zip(axes, _SHOWN, strict=False):
        _draw_objective(each, found, key, label)
    axes[-1].set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", fontsize=10, title=_title(found))
    files = []
    for ending, options in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
        image = io.BytesIO()
        figure.savefig(image, format=ending, **options)
        target = path.with_name(f"{path.name}.{ending}")
        write_atomically(target, image.getvalue())
        files.append(target)
    return files


def _draw_objective(axes: Any, found: dict[str, Any], key: str, label: str) -> None:
    budget = found["budget"]
    unit, limit = budget["unit"], budget["limit"]
    floor = limit / 100
    axes.axhline(limit, color="0.5", linestyle="--", linewidth=0.9, label="budget")
    axes.axvline(0.0, color="0.7", linewidth=0.8)
    for group, (marker, colour) in _MARKERS.items():
        members = [each for each in found["candidates"] if each["group"] == group]
        if members:
            _draw_group(axes, members, key, unit, _NAMES.get(group, group), marker, colour)
    axes.plot([0.0], [0.0], marker="+", color="black", markersize=11, linestyle="none", label="dense")
    held = found["verification"]["held"]
    if held is not None:
        delta = held["delta"]
        low, high = delta[f"{unit}_ci95"]
        error = [[max(delta[unit] - low, 0.0)], [max(high - delta[unit], 0.0)]]
        axes.errorbar(
            100 * delta[key], delta[unit], yerr=error, fmt="h", color="black", capsize=4, markersize=9,
            label="chosen, on held-out text",
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=max(floor, 1e-6))
    axes.set_ylim(-2 * floor, 6 * limit)
    axes.set_xlabel(f"{label} (%)")
    axes.set_ylabel("perplexity added" if unit == "ppl" else "loss added (nats per token)")
    axes.grid(alpha=0.25)


def _draw_group(
    axes: Any, members: Sequence[dict[str, Any]], key: str, unit: str, name: str, marker: str, colour: str
) -> None:
    lost = [each["delta"][unit] for each in members]
    spread = [each["delta"][f"{unit}_ci95"] or (value, value) for each, value in zip(members, lost, strict=True)]
    error = [
        [max(value - low, 0.0) for value, (low, _) in zip(lost, spread, strict=True)],
        [max(high - value, 0.0) for value, (_, high) in zip(lost, spread, strict=True)],
    ]
    axes.errorbar(
        [100 * each[key] for each in members], lost, yerr=error, fmt=marker, color=colour, markersize=5,
        linewidth=0.7, alpha=0.75, label=name,
    )  # fmt: skip


def _title(found: dict[str, Any]) -> str:
    first = found["candidates"][0]
    unit = "perplexity" if found["budget"]["unit"] == "ppl" else "nats"
    return (
        f"{found['model']}, {first['dense_bits_per_byte']:.3f} bits per byte dense\n"
        f"{found['text']}, {first['tokens_scored']} tokens searched\n"
        f"budget +{found['budget']['limit']:g} {unit}, saving {found['minimise']}"
    )
