"""Pictures of a frontier: what candidates saved of each objective against what they lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quicksilver.measure.picture import new_figure, write_figure

_SHOWN = (
    ("flops_reduction", "FLOPs saved, head included"),
    ("flops_body_reduction", "FLOPs saved in the layers"),
    ("bitops_reduction_8bit", "bit operations saved against 8 bits throughout"),
    ("weight_bytes_reduction_8bit", "weight bytes saved against 8 bits throughout"),
    ("kv_used_bytes_reduction", "cache bytes saved"),
)
_LEFT, _BELOW, _ABOVE = 0.2, 0.25, 2.5  # of what is shown, in shares of the largest saving and of the budget

_GROUPS = {  # how each is drawn, and what the legend calls it
    "together": ("o", "tab:blue", "all together"),
    "channels": ("s", "tab:orange", "precision alone"),
    "skipping": ("^", "tab:green", "keys and values left out alone"),
    "entries": (">", "tab:gray", "entries in 8 bits alone"),
    "shortcuts": ("D", "tab:red", "shortcuts alone"),
    "halting": ("v", "tab:purple", "halting alone"),
    "fusion": ("P", "tab:brown", "fusion alone"),
    "exit": ("X", "0.35", "every token exits at one layer"),
    "paper": ("*", "tab:pink", "paper, thresholds tuned"),
    "paper, as published": ("*", "tab:cyan", "paper, as published"),
}


def draw(path: Path, found: dict[str, Any]) -> list[Path]:
    """Write what `report.frontier` found as PNG and SVG files, `path` without an ending; return the files."""
    figure = new_figure(12, 4.2 * 3)
    axes = figure.subplots(3, 2).flatten()
    for each, (key, label) in zip(axes, _SHOWN, strict=False):
        _draw_objective(each, found, key, label)
    axes[-1].set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", fontsize=10, title=_title(found))
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        write_figure(figure, file)
    return files


def _draw_objective(axes: Any, found: dict[str, Any], key: str, label: str) -> None:
    budget = found["budget"]
    unit, limit = budget["unit"], budget["limit"]
    axes.axhline(limit, color="0.5", linestyle="--", linewidth=0.9, label="budget")
    axes.axvline(0.0, color="0.7", linewidth=0.8)
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    right = max(0.02, *(each[key] for each in found["candidates"]))
    left, bottom, top = -_LEFT * right, -_BELOW * limit, _ABOVE * limit
    for group, (marker, colour, called) in _GROUPS.items():
        members = [each for each in found["candidates"] if each["group"] == group]
        inside = [each for each in members if each[key] >= left and bottom <= each["delta"][unit] <= top]
        outside = len(members) - len(inside)
        name = called + (f" ({outside} outside)" if outside else "")
        if members:
            _draw_group(axes, inside, key, unit, name, marker, colour)
    axes.plot([0.0], [0.0], marker="+", color="black", markersize=11, linestyle="none", label="dense")
    held = found["verification"]["held"]
    if held is not None:
        chosen = {key: held["delta"][key], "delta": held["delta"]}
        _draw_group(axes, [chosen], key, unit, "chosen, on held-out text", "h", "black", size=10)
    axes.set_xlim(100 * left, 105 * right)
    axes.set_ylim(bottom, top)
    axes.set_xlabel(f"{label} (%)")
    axes.set_ylabel("perplexity added" if unit == "ppl" else "loss added (nats per token)")
    axes.grid(alpha=0.25)


def _draw_group(
    axes: Any,
    members: Sequence[dict[str, Any]],
    key: str,
    unit: str,
    name: str,
    marker: str,
    colour: str,
    size: int = 6,
) -> None:
    lost = [each["delta"][unit] for each in members]
    spread = [each["delta"][f"{unit}_ci95"] or (value, value) for each, value in zip(members, lost, strict=True)]
    error = [
        [max(value - low, 0.0) for value, (low, _) in zip(lost, spread, strict=True)],
        [max(high - value, 0.0) for value, (_, high) in zip(lost, spread, strict=True)],
    ]
    saved = [100 * each[key] for each in members]
    style = {"fmt": marker, "color": colour, "markersize": size, "linewidth": 0.8, "alpha": 0.75}
    axes.errorbar(saved, lost, yerr=error if members else None, label=name, **style)


def _title(found: dict[str, Any]) -> str:
    first = found["candidates"][0]
    unit = "perplexity" if found["budget"]["unit"] == "ppl" else "nats"
    return (
        f"{found['model']}, {first['dense_bits_per_byte']:.3f} bits per byte dense\n"
        f"{found['text']}, {first['tokens_scored']} tokens searched\n"
        f"budget +{found['budget']['limit']:g} {unit}, saving {found['minimise']}"
    )
