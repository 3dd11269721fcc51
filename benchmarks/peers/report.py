"""`python -m benchmarks.peers.report`: the tables and the picture of a results file.

The rows are written by `__main__.py`; nothing is measured here.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.engines import PEERS
from quicksilver.core.files import write_atomically

Row = dict[str, Any]

_COLUMNS = (
    "engine",
    "decode, ms/token",
    "tokens/s",
    "x baseline",
    "weights, MB/token",
    "of bandwidth",
    "prefill, ms",
    "x baseline",
    "generate, ms",
    "peak, MB",
    "KL",
    "top-1",
    "max abs",
    "mean abs",
    "KL after prefill",
    "top-1 after prefill",
    "max abs after prefill",
)
_COLOURS = (*(f"C{i}" for i in range(10)), "black", "gold", "navy", "lime")
_LEAST_KL = 1e-6


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each model's last run."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        name = row["model"]["name"]
        if runs.get(name, [row])[0]["date"] != row["date"]:
            runs[name] = []
        runs.setdefault(name, []).append(row)
    return list(runs.values())


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of one model's run, its settings above it and its bars below it."""
    by_task = {(row["task"], row["engine"]): row for row in rows}
    engines = list(dict.fromkeys(row["engine"] for row in rows if row["task"] != "bandwidth"))
    lines = [
        *_heading(rows[0], by_task),
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_table_row(engine, by_task) for engine in engines),
        "",
    ]
    bars = [bar for row in rows for bar in row["bars"]]
    for bar in bars:
        verdict = "pass" if bar["passed"] else "MISSED"
        lines.append(
            f"- {verdict}: {bar['task']}, {bar['quantity']} = {bar['ratio']:.3f}, {bar['bound']} {bar['limit']:.2f}"
        )
    return "\n".join([*lines, ""] if bars else lines)


def _heading(first: Row, by_task: dict[tuple[str, str], Row]) -> list[str]:
    model, sizes = first["model"], first["settings"]
    (read,) = (row for (task, _), row in by_task.items() if task == "bandwidth")
    apart = ", each family in a process of its own" if sizes.get("isolated") else ""
    versions = ", ".join(f"{name} {number}" for name, number in first["peers"].items() if number)
    lines = [
        f"### {model['name']}",
        "",
        f"`{first['command']}`",
        "",
        f"{model['family']}, {model['layers']} layers, hidden size {model['hidden_size']}, vocabulary"
        f" {model['vocab_size']}, {model['weights']}, {model['dtype']}; {first['threads']} thread(s) of"
        f" {first['cpu']}; {sizes['rounds']} rounds, engines in turn{apart}. Decode: {sizes['new_tokens']} tokens after"
        f" {sizes['prompt_tokens']}; prefill: {sizes['prefill_tokens']} tokens. Memory is read at"
        f" {read['median'] / 1e9:.1f} GB/s ({read['method']}). quicksilver {first['quicksilver']}, torch"
        f" {first['torch']}, transformers {first['transformers']}{', ' + versions if versions else ''}.",
        "",
    ]
    if sizes["quick"]:
        lines += ["`--quick`: tries the benchmark itself; figures and bars say nothing about the engines.", ""]
    return lines


def _table_row(engine: str, by_task: dict[tuple[str, str], Row]) -> str:
    decode, prefill, generate, memory = (
        by_task.get((task, engine)) for task in ("decode", "prefill", "generate", "memory")
    )
    quality = next(row["quality"] for (_, name), row in by_task.items() if name == engine and "quality" in row)
    cells = [
        engine,
        *(["", ""] if decode is None else [f"{decode['median'] * 1e3:.2f}", f"{1 / decode['median']:.1f}"]),
        _speed(decode),
        *(
            ["", ""]
            if decode is None
            else [f"{decode['weight_bytes_per_token'] / 1e6:.1f}", f"{decode['bandwidth_fraction']:.2f}"]
        ),
        "" if prefill is None else f"{prefill['median'] * 1e3:.1f}",
        _speed(prefill),
        "" if generate is None else f"{generate['median'] * 1e3:.1f}",
        "" if memory is None else f"{memory['median'] / 1e6:.0f}",
        f"{quality['kl']:.2e}",
        f"{quality['top1_agreement']:.1%}",
        f"{quality['max_abs']:.3g}",
        f"{quality['mean_abs']:.3g}",
        *_after_prefill(engine, by_task),
    ]
    return f"| {' | '.join(cells)} |"


def _after_prefill(engine: str, by_task: dict[tuple[str, str], Row]) -> tuple[str, str, str]:
    """Return how near the one token after the timed prompt was, nothing where a run did not compare it."""
    rows = (row for (_, name), row in by_task.items() if name == engine)
    quality = next((row["prefill_quality"] for row in rows if "prefill_quality" in row), None)
    if quality is None:
        return ("", "", "")
    return f"{quality['kl']:.2e}", "same" if quality["top1_agreement"] == 1 else "other", f"{quality['max_abs']:.3g}"


def _speed(row: Row | None) -> str:
    """Return how many times as fast as its baseline an engine was."""
    if row is None or row["baseline"] == row["engine"]:
        return ""
    return f"{1 / row['ratio_to_baseline']:.2f} {row['baseline']}"


def draw(path: Path, runs: Sequence[Sequence[Row]]) -> None:
    """Write a PNG: each model's tokens per second against the bytes of weights read, and against its KL."""
    image = io.BytesIO()
    figure(runs).savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())


def figure(runs: Sequence[Sequence[Row]]) -> Any:
    """Return the picture, two panels for each model; an engine has one colour in all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 4.6 * len(runs)), layout="constrained")
    FigureCanvasAgg(drawn)
    decoded = [[row for row in rows if row["task"] == "decode"] for rows in runs]
    engines = dict.fromkeys(row["engine"] for rows in decoded for row in rows)
    colours = dict(zip(engines, itertools.cycle(_COLOURS)))
    for rows, shown, (left, right) in zip(runs, decoded, drawn.subplots(len(runs), 2, squeeze=False), strict=True):
        (read,) = (row for row in rows if row["task"] == "bandwidth")
        _draw_run(left, right, shown, read["median"], colours)
        settings = f"decode, {rows[0]['threads']} thread(s), {rows[0]['cpu']}"
        left.set_title(f"{rows[0]['model']['name']}: speed and bytes ({settings})", fontsize=11)
        right.set_title(f"{rows[0]['model']['name']}: speed and distance from the float model", fontsize=11)
    return drawn


def _draw_run(left: Any, right: Any, decoded: Sequence[Row], bandwidth: float, colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    for row in decoded:
        speed, megabytes = 1 / row["median"], row["weight_bytes_per_token"] / 1e6
        engine = row["engine"]
        style = {"marker": "s" if engine in PEERS else "o", "s": 60, "color": colours[engine], "label": engine}
        left.scatter(megabytes, speed, **style)
        right.scatter(max(row["quality"]["kl"], _LEAST_KL), speed, **style)
    sizes = sorted(row["weight_bytes_per_token"] / 1e6 for row in decoded)
    reach = [sizes[0] * 0.8, sizes[-1] * 1.2]
    left.plot(reach, [bandwidth / 1e6 / size for size in reach], color="0.5", label="measured read bandwidth")
    left.set(xlabel="weights read, MB per token", ylabel="tokens/s", xscale="log", yscale="log")
    label = f"KL(float || engine), nats per token ({_LEAST_KL:g} stands for less)"
    right.set(xlabel=label, ylabel="tokens/s", xscale="log", yscale="log")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        _tick(axis)
    right.xaxis.set_major_locator(LogLocator())
    left.legend(fontsize=8)


def _tick(axis: Any) -> None:
    """Mark a logarithmic axis at round numbers written out, the more of them the fewer decades it spans."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if high < 5 * low else (1, 2, 5), numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write, PNG.")
def main(results: Path, plot: Path | None) -> None:
    """Print the tables of the last run of each model in RESULTS, a JSON-lines file."""
    runs = latest(json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())
    for rows in runs:
        click.echo(markdown(rows))
    if plot is not None:
        draw(plot, runs)


if __name__ == "__main__":
    main()
