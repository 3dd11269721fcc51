"""Draw a run's log as a picture: training and validation loss against tokens seen.

Reads only the JSON lines that `train.py` writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from training.common import InputError


def read_log(path: Path) -> list[dict]:
    """Return the entries of a JSON-lines log.

    Raises:
        InputError: the file is missing.
    """
    if not path.is_file():
        raise InputError(f"no such log: {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curve(log: Path, picture: Path) -> None:
    """Write the loss curve of `log` to `picture` (PNG)."""
    from matplotlib.figure import Figure

    entries = read_log(log)
    training = [(entry["tokens"] / 1e6, entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["tokens"] / 1e6, entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), linewidth=0.8, color="#7a9cc6", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker=".", color="#b5442c", label="validation")
        axes.set_ylim(min(loss for _, loss in held_out) - 0.3, max(loss for _, loss in held_out[:3]) + 0.5)
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    figure.savefig(picture, dpi=130, format="png")
