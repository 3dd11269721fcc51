"""Pictures of an evaluation: what each plan saved and cost, and how deep each token of a text ran."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quicksilver.core.files import write_atomically

_COLUMNS, _ROWS = 96, 10  # of a token panel, in characters


@dataclass(frozen=True)
class TokenPanel:
    """A text whose tokens are coloured by depth."""

    title: str  # what is shown
    tokens: Sequence[str]  # the tokens, as text
    depths: Sequence[int]  # layers each of them ran


def draw_summary(path: Path, results: Sequence[dict[str, Any]], panels: Sequence[TokenPanel]) -> None:
    """Write a PNG with the plans' cost against what they saved, and texts coloured by depth."""
    figure = new_figure(11, 4.4 + 2.4 * len(panels))
    top, *below = figure.subplots(1 + len(panels), 1, height_ratios=(1.75, *[1.0] * len(panels)))
    _draw_plans(top, results)
    for axes, panel in zip(below, panels, strict=True):
        _draw_tokens(figure, axes, panel, results[0]["model"]["layers"])
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return a figure of so many inches that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's ending; an interrupted write leaves nothing there."""
    image = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None  # so that the same figure is the same file
    figure.savefig(image, format=path.suffix[1:], dpi=110, metadata=metadata)
    write_atomically(path, image.getvalue())


def _draw_plans(axes: Any, results: Sequence[dict[str, Any]]) -> None:
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    for i, result in enumerate(results):
        delta, prompt = result["delta"], result["accelerated"]["prompt"]
        saved = 100 * (delta if prompt is None else prompt)["flops_reduction"]
        low, high = delta["nll_ci95"] or (delta["nll"], delta["nll"])
        error = [[delta["nll"] - low], [high - delta["nll"]]]
        label = f"{result['plan']['name']}: {result['accelerated']['mean_depth']:.2f} layers per token"
        if "precision" in result["plan"]:
            label = f"{result['plan']['name']}: {result['accelerated']['mean_bits']:.2f} bits per weight"
        if prompt is not None:
            fused = f"{prompt['fused_fraction']:.0%} of prompts fused"
            label = f"{result['plan']['name']}: {fused}; their FLOPs, the loss after"
        marker = "osD^vP*X"[i % 8]
        axes.errorbar(saved, delta["nll"], yerr=error, fmt=marker, capsize=4, markersize=9, alpha=0.8, label=label)
    axes.set_xlabel("FLOPs saved against dense, head and signals included (%)")
    axes.set_ylabel("loss added (nats per token)")
    axes.set_title("\n".join(_settings(results)), fontsize=10)
    axes.legend(loc="best", fontsize=9)
    axes.grid(alpha=0.25)


def _settings(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each protocol under which something was measured."""
    lines = {}
    for result in results:
        window_config = result["protocol"]
        after = "" if window_config["prompt"] is None else f", after prompts of {window_config['prompt']}"
        line = (
            f"{result['model']['name']}: {result['dense']['bits_per_byte']:.3f} bits per byte dense on"
            f" {window_config['text']}, {result['tokens_scored']} tokens, context {window_config['context']},"
            f" stride {window_config['stride']}{after}"
        )
        lines[line] = None
    return list(lines)


def _draw_tokens(figure: Any, axes: Any, panel: TokenPanel, layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colours = ScalarMappable(Normalize(vmin=min(1, layers), vmax=layers), "viridis")
    column = row = shown = 0
    for token, depth in zip(panel.tokens, panel.depths, strict=True):
        text = token.replace("\n", "⏎")
        if column + len(text) > _COLUMNS:
            column, row = 0, row + 1
        if row >= _ROWS:
            break
        shade = colours.to_rgba(depth)  # type: ignore[arg-type]  # it takes numbers too
        axes.add_patch(Rectangle((column, -row - 0.45), len(text), 0.9, facecolor=shade, linewidth=0))
        ink = "white" if sum(shade[:3]) < 1.4 else "black"
        for offset, symbol in enumerate(text):
            axes.text(
                column + offset + 0.5, -row, symbol, family="monospace", fontsize=8, ha="center", va="center", color=ink
            )
        column += len(text)
        shown += 1
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(-_ROWS + 0.4, 0.6)
    axes.set_axis_off()
    mean = sum(panel.depths[:shown]) / max(shown, 1)
    axes.set_title(f"{panel.title} (mean {mean:.2f} of {layers} in this excerpt)", fontsize=10)
    figure.colorbar(colours, ax=axes, label="layers run", ticks=range(1, layers + 1))
