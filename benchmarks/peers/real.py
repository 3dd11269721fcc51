"""`python -m benchmarks.peers.real FILE.gguf ...`: our engine and llama.cpp on the same files, in turn.

Each reads the file as it is. What the engines are is in `held.py` and `llama_cpp_engine.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import rows, timing
from benchmarks.memory import call_apart
from benchmarks.peers import bandwidth, held, llama_cpp_engine, roster
from benchmarks.peers.measuring import References, Settings, check, say, settled
from benchmarks.peers.remote import RemoteEngine, explained, worker
from benchmarks.peers.subjects import text_ids
from benchmarks.rows import Measurement
from quicksilver.measure.texts import read_text

LLAMA = "llama.cpp"
READ = "streaming-read"
_RESULTS = Path(__file__).parent.parent / "results" / "real.jsonl"
_TOLERANCE = 0.10  # as for 8 bits in `limits.py`: weights are the same, activations are rounded to 8 bits
_BATCHES = (128, 512)  # tokens that llama.cpp computes at a time, of which the faster is kept
_WARMUP, _LOADS = 1, 3
_SLACK = 64  # tokens of context beyond what is fed
FILES = click.argument(
    "paths",
    nargs=-1,
    required=True,
    envvar="QUICKSILVER_GGUF_FILES",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)


@dataclass(frozen=True)
class Sizes:
    """Of a run, in tokens, and how it is repeated."""

    threads: int
    rounds: int
    new_tokens: int
    prefill_tokens: int
    quality_tokens: int
    depths: tuple[int, ...]

    def settings(self) -> Settings:
        """Return them as the other benchmark has them."""
        return Settings(
            self.threads, self.rounds, self.new_tokens, self.depths[0], self.prefill_tokens, self.quality_tokens, False
        )

    @property
    def context(self) -> int:
        """Tokens that must fit."""
        return max(self.depths[-1] + self.new_tokens, self.prefill_tokens, self.quality_tokens) + _SLACK


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@FILES
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Default: the demo's texts.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads of each engine.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timed rounds.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Decoded at each depth.")
@click.option("--prefill-tokens", type=click.IntRange(min=16), default=512, show_default=True, help="Of the prompt.")
@click.option("--quality-tokens", type=click.IntRange(min=32), default=128, show_default=True, help="Logits compared.")
@click.option("--depths", default="128,2000,8000", show_default=True, help="Entries in the cache before decoding.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=_RESULTS, show_default="results/real.jsonl"
)
def main(paths: Sequence[Path], text: Path | None, depths: str, output: Path, **sizes: int) -> None:
    """Time prompts, decoding at each depth and loading on GGUF files, our engine and llama.cpp in turn.

    Files are named, or given by the environment variable QUICKSILVER_GGUF_FILES. Logits are compared with those of the
    file's weights as float32 numbers first; exit status 1 where they are too far from it.
    """
    with explained():
        asked = Sizes(depths=_numbers(depths), **sizes)
        words = None if text is None else read_text(text).texts[0]
        for path in paths:
            measured = measure(path, text_ids(path, asked.context, words), asked)
            rows.append(output, measured)
            click.echo(table(measured))


def _numbers(listed: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted(int(each) for each in listed.split(",")))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise ValueError(f"--depths {listed}: whole numbers above 0 are needed, with commas between them")
    return found


def measure(path: Path, ids: list[int], sizes: Sizes) -> list[dict[str, Any]]:
    """Check the engines on a file, time them in turn, and return the rows.

    Args:
        path: the file.
        ids: tokens of a text, as many as the context.
        sizes: of the run.

    Raises:
        GateError: an engine computes something else than it should.
        WorkerError: a process of engines failed or died.
    """
    torch.set_num_threads(sizes.threads)
    say(f"{path.name}: float logits")
    keep = ((sizes.quality_tokens, sizes.quality_tokens), (sizes.prefill_tokens, 1))
    references = References(*call_apart(held.reference_logits, path, sizes.threads, ids, keep))
    loads = _loads(path, sizes)
    say(f"{path.name}: check")
    with ExitStack() as stack:
        theirs = partial(llama_cpp_engine.load_held, LLAMA, path, sizes.threads, sizes.context, _BATCHES)
        ours = partial(held.load_held, path, LLAMA, sizes.threads)
        engines = [
            *stack.enter_context(worker(LLAMA, theirs)),
            *stack.enter_context(worker("quicksilver", ours)),
        ]
        tolerances = {engine.name: _TOLERANCE for engine in engines}
        check(engines, sizes.settings(), ids, references, tolerances)
        measurements = _seconds(engines, ids, sizes)
    shared = {
        "model": describe(path),
        "peers": roster.versions(),
        "warmup": _WARMUP,
        "settings": {**asdict(sizes), "isolated": True},
    }
    return rows.to_rows("real", [*measurements, *loads], shared, torch.device("cpu"))


def _loads(path: Path, sizes: Sizes) -> list[Measurement]:
    """Time loading in turn, each time in a process of its own; the file is in the system's cache from before."""
    say("load")
    turns = {
        LLAMA: partial(call_apart, llama_cpp_engine.seconds_to_load, path, sizes.threads, sizes.context),
        held.OURS: partial(call_apart, held.seconds_to_load, path, sizes.threads),
    }
    taken = timing.in_turn(turns, _LOADS, _WARMUP)
    return [Measurement("load", name, LLAMA, "seconds", tuple(values), {}) for name, values in taken.items()]


def _seconds(engines: Sequence[RemoteEngine], ids: list[int], sizes: Sizes) -> list[Measurement]:
    read = bandwidth.StreamingRead(bandwidth.BYTES)

    def timed(task: str, divisor: int, turns: dict[str, Any]) -> list[Measurement]:
        say(task)
        taken = timing.in_turn({name: partial(settled, turn) for name, turn in turns.items()}, sizes.rounds, _WARMUP)
        unit = "seconds per token" if divisor > 1 else "seconds"
        found = []
        for engine in engines:
            values = tuple(value / divisor for value in taken[engine.name])
            details = {**engine.details, "weight_bytes_per_token": engine.weight_bytes}
            found.append(Measurement(task, engine.name, engine.baseline, unit, values, details))
        if READ in taken:
            rates = tuple(read.nbytes / value for value in taken[READ])
            found.append(Measurement("bandwidth", READ, READ, "bytes per second", rates, {"method": read.method}))
        return found

    prompt = ids[: sizes.prefill_tokens]
    found = timed("prefill", 1, {engine.name: partial(engine.prefill, prompt) for engine in engines})
    for depth in sizes.depths:
        say(f"feeding {depth}")
        before, fed = ids[:depth], ids[depth : depth + sizes.new_tokens]
        for engine in engines:
            engine.decode(before, fed[:1])
        turns: dict[str, Any] = {engine.name: partial(engine.decode, before, fed) for engine in engines}
        if depth == sizes.depths[0]:
            turns = {READ: read.seconds, **turns}
        found += timed(f"decode after {depth}", sizes.new_tokens, turns)
    return found


def describe(path: Path) -> dict[str, Any]:
    """Return what a reader must know of a file: which it is, by its hash, and its model's shape."""
    from quicksilver.loading.gguf.model import GgufModel

    config = GgufModel(path).config
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": path.name,
        "sha256": digest,
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "positions": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return a run's table: tokens per second, and how many times llama.cpp's they are."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in measured) if task not in ("bandwidth", "load")]
    found = {(row["task"], row["engine"]): row for row in measured}
    first = measured[0]
    (read,) = (row for row in measured if row["task"] == "bandwidth")
    engines = list(dict.fromkeys(row["engine"] for row in measured if row["task"] == tasks[0]))
    rounds = first["settings"]["rounds"]
    lines = [
        f"{first['model']['name']}; {first['threads']} thread(s) of {first['cpu']}; {rounds} rounds in turn, medians;"
        f" memory is read at {read['median'] / 1e9:.1f} GB/s; commit {first['commit']}",
        "",
        f"| engine | {' | '.join(f'{task}, tokens/s | x' for task in tasks)} | load, s | x | KL |",
        "|---" * (2 * len(tasks) + 4) + "|",
    ]
    for engine in engines:
        cells = [engine]
        for task in tasks:
            row = found[task, engine]
            tokens = first["settings"]["prefill_tokens"] if row["unit"] == "seconds" else 1
            cells += [f"{tokens / row['median']:.1f}", _ratio(row)]
        load = found.get(("load", engine), found["load", held.OURS])
        cells += [f"{load['median']:.2f}", _ratio(load), f"{found[tasks[0], engine]['quality']['kl']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ratio(row: dict[str, Any]) -> str:
    """Return how many times as fast as its baseline an engine is, the median over rounds; nothing of itself."""
    return "" if row["engine"] == row["baseline"] else f"{1 / row['ratio_to_baseline']:.2f}"


if __name__ == "__main__":
    main()
