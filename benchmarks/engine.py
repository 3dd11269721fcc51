"""`python -m benchmarks.engine`: time and weigh our engine against Hugging Face's on one random GPT-2.

This file is the order of the work and its options; what is run, checked and printed is in the files it imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks import bars, contenders, gate, rows, table, timing
from benchmarks.contenders import DENSE, HUGGINGFACE, Contender
from benchmarks.memory import peak_rss_bytes
from benchmarks.rows import Measurement
from benchmarks.tasks import Decode, DecodeLong, Generate, Prefill, Task, run

_RESULTS = Path(__file__).parent / "results" / "engine.jsonl"
_REPEATS, _QUICK_REPEATS, _WARMUP = 9, 5, 2


@dataclass(frozen=True)
class Settings:
    """Sizes of a run, in tokens, and how it is repeated."""

    threads: int
    repeats: int
    new_tokens: int
    prompt_tokens: int
    prefill_tokens: int
    long_prompt_tokens: int
    quick: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option("--repeats", type=click.IntRange(min=5), help="Timed rounds (default: 9, or 5 with --quick).")
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens decoded.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Before decoding.")
@click.option("--prefill-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of task prefill.")
@click.option(
    "--long-prompt-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Before decode-long."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=_RESULTS,
    show_default="benchmarks/results/engine.jsonl",
    help="JSON-lines file that the rows are appended to.",
)
@click.option("--quick", is_flag=True, help="A very small model: tries the benchmark itself, measures nothing.")
def main(output: Path, repeats: int | None, quick: bool, **sizes: int) -> None:
    """Measure Hugging Face's GPT-2, our engine dense, with half of the tokens halting midway, and with half fusing.

    The engines are checked against each other first; exit status 1 where they disagree. A missed bar is
    reported and changes nothing.

    \b
    Examples:
      python -m benchmarks.engine
      python -m benchmarks.engine --threads 1 --repeats 15
      python -m benchmarks.engine --quick --output /tmp/engine.jsonl
    """
    settings = Settings(repeats=repeats or (_QUICK_REPEATS if quick else _REPEATS), quick=quick, **sizes)
    longest = max(settings.prompt_tokens, settings.prefill_tokens, settings.long_prompt_tokens) + settings.new_tokens
    if longest > contenders.POSITIONS:
        raise click.UsageError(f"a prompt and the new tokens together must fit the context of {contenders.POSITIONS}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}") from None
    logging.set_verbosity_error()
    try:
        measured = measure(settings)
    except gate.GateError as error:
        raise click.ClickException(f"correctness gate failed, nothing was timed: {error}") from None
    rows.append(output, measured)


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Measure, print the table, and return the rows.

    Raises:
        GateError: an engine computes something else than it should.
    """
    memory = measure_memory(settings)  # while this process is small
    torch.set_num_threads(settings.threads)
    model = contenders.build_model(settings.quick)
    engines = contenders.build_contenders(model)
    ids = contenders.random_ids(model, contenders.POSITIONS)
    tasks = build_tasks(ids, settings)
    with torch.inference_mode():
        _say("gate")
        work = gate.check(engines, tasks, ids[:, : settings.prefill_tokens])
        seconds = [m for task in tasks for m in measure_seconds(task, engines, work, settings.repeats)]
    measurements = [*seconds, *memory]
    shared = {
        "model": _describe(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "warmup": _WARMUP,
        "settings": asdict(settings),
    }
    measured = rows.to_rows("engine", measurements, shared, model.device)
    verdicts = bars.judge(measurements)
    table.print_table(_heading(measured[0]), measurements, verdicts)
    for row in measured:
        verdict = verdicts.get((row["task"], row["engine"]))
        row["bar"] = None if verdict is None else verdict.to_dict()
    return measured


def build_tasks(ids: torch.Tensor, settings: Settings) -> tuple[Task, ...]:
    """Return what is timed, in order, over the first of the tokens [1, T]."""
    prompt, long_prompt, new = settings.prompt_tokens, settings.long_prompt_tokens, settings.new_tokens
    return (
        Prefill(ids[:, : settings.prefill_tokens]),
        Decode(ids[:, : prompt + new], prompt),
        DecodeLong(ids[:, : long_prompt + new], long_prompt),
        Generate(ids[:, :prompt], new),
    )


def measure_seconds(
    task: Task, engines: Sequence[Contender], work: dict[tuple[str, str], gate.Work], repeats: int
) -> list[Measurement]:
    """Time a task on the engines that do it, in turn."""
    _say(task.name)
    taking_part = [e for e in engines if task.engines is None or e.name in task.engines]
    seconds = timing.interleaved([_case(task, engine) for engine in taking_part], repeats, _WARMUP)
    measurements = []
    for engine in taking_part:
        values = tuple(value / task.divisor for value in seconds[engine.name])
        details = {}
        if engine.forced is not None:
            details = {**work[task.name, engine.name].to_dict(), "plan": engine.model.plan.to_dict()}
        measurements.append(Measurement(task.name, engine.name, engine.baseline, task.unit, values, details))
    return measurements


def measure_memory(settings: Settings) -> list[Measurement]:
    """Return the peak memory of Hugging Face and of ours, each doing `build_and_decode` in its own process."""
    _say("memory")
    names = (HUGGINGFACE, DENSE)
    peaks = peak_rss_bytes(build_and_decode, [(name, settings) for name in names])
    return [
        Measurement("memory", name, HUGGINGFACE, "bytes", (peak,), {}) for name, peak in zip(names, peaks, strict=True)
    ]


def build_and_decode(engine: str, settings: Settings) -> None:
    """Build the model and an engine, prefill, and decode what follows."""
    torch.set_num_threads(settings.threads)
    model = contenders.build_model(settings.quick)
    build = {HUGGINGFACE: contenders.huggingface, DENSE: contenders.dense}[engine]
    running = build(model).model
    ids = contenders.random_ids(model, settings.prefill_tokens + settings.new_tokens)
    task = Decode(ids, settings.prefill_tokens)
    with torch.inference_mode():
        run(task, running, task.prepare(running))


def _case(task: Task, engine: Contender) -> timing.Case:
    model = engine.model
    return timing.Case(engine.name, lambda: task.prepare(model), lambda state: run(task, model, state))


def _describe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "family": config.model_type,
        "weights": f"random, seed {contenders.SEED}",
        "layers": config.n_layer,
        "hidden_size": config.n_embd,
        "heads": config.n_head,
        "positions": config.n_positions,
        "vocab_size": config.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": config._attn_implementation,
    }


def _heading(row: dict[str, Any]) -> list[str]:
    model, sizes = row["model"], row["settings"]
    lines = [
        f"GPT-2 shape, {model['layers']} layers, {model['parameters'] / 1e6:.1f}M parameters, {model['weights']},"
        f" {row['dtype']}; {row['threads']} threads, {row['cpu']}",
        f"quicksilver {row['quicksilver']}, torch {row['torch']}, transformers {row['transformers']}"
        f" ({model['attention']} attention), python {row['python']}; {sizes['repeats']} rounds after {_WARMUP}",
        f"prefill {sizes['prefill_tokens']} tokens; decode and generate {sizes['new_tokens']} after"
        f" {sizes['prompt_tokens']}, decode-long after {sizes['long_prompt_tokens']};"
        f" memory: build, prefill {sizes['prefill_tokens']}, decode {sizes['new_tokens']}",
    ]
    if sizes["quick"]:
        lines.append("--quick: tries the benchmark itself; figures and verdicts below say nothing about the engine")
    return lines


def _say(progress: str) -> None:
    click.echo(progress, err=True)


if __name__ == "__main__":
    main()
