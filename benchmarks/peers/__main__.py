"""`python -m benchmarks.peers`: our engine beside llama.cpp, CTranslate2 and Hugging Face, on the same weights.

This file is the order of the work and its options; what is made, run, checked and printed is in the files it imports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks import rows
from benchmarks.peers import files, report, roster
from benchmarks.peers.measuring import Settings, measure, measure_memory, say
from benchmarks.peers.remote import explained
from benchmarks.peers.subjects import SHAPES, Subject
from quicksilver.measure.texts import read_text

_RESULTS = Path(__file__).parent.parent / "results" / "peers.jsonl"
_ROUNDS, _QUICK_ROUNDS = 9, 3


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shapes", default=",".join(SHAPES), show_default=True, help="Shapes, embedded models or folders.")
@click.option("--engines", default="", help="Names, or peers and ours for all of them (default: everything).")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads of each engine.")
@click.option("--rounds", type=click.IntRange(min=1), help="Timed rounds (default: 9, or 3 with --quick).")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens decoded.")
@click.option("--prompt-tokens", type=click.IntRange(min=4), default=64, show_default=True, help="Before decoding.")
@click.option("--prefill-tokens", type=click.IntRange(min=16), default=512, show_default=True, help="Of task prefill.")
@click.option("--quality-tokens", type=click.IntRange(min=32), default=128, show_default=True, help="Logits compared.")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="For models with tokenizers."
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Peak memory, a process for each engine.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Keeps files made (default: nowhere).")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=_RESULTS,
    show_default="benchmarks/results/peers.jsonl",
    help="JSON-lines file that the rows are appended to.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write, PNG.")
@click.option("--quick", is_flag=True, help="Very small shapes: tries the benchmark itself, measures nothing.")
def main(
    shapes: str,
    engines: str,
    rounds: int | None,
    text: Path | None,
    memory: bool,
    work: Path | None,
    output: Path,
    plot: Path | None,
    quick: bool,
    **sizes: int,
) -> None:
    """Compare our engine with those that people would run instead, in turn, each family in a process of its own.

    Logits are compared with the float model's first; exit status 1 where they are too far from it. A missed bar is
    reported and changes nothing.

    \b
    Examples:
      python -m benchmarks.peers --work /tmp/peers
      python -m benchmarks.peers --work /tmp/peers --shapes ref-llama --rounds 21
      python -m benchmarks.peers --work /tmp/peers --engines peers --threads 1
      python -m benchmarks.peers --quick --output /tmp/peers.jsonl
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = Settings(rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS), quick=quick, **sizes)
    runs = []
    with ExitStack() as stack, explained():
        words = None if text is None else read_text(text).texts[0]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if work is None else work
        subjects = [Subject.of(name, folder, quick) for name in _listed(shapes)]
        for measured in _compare(subjects, _listed(engines), settings, words, memory):
            runs.append(measured)
            rows.append(output, measured)
            click.echo(report.markdown(measured))
    if plot is not None:
        report.draw(plot, runs)


def _compare(
    subjects: Sequence[Subject], engines: Sequence[str], settings: Settings, words: str | None, memory: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield each subject's rows; before anything is timed all files are made and all memory is measured."""
    rosters = [(each, roster.select(each, engines, say)) for each in subjects]
    tokens = [each.token_ids(settings.context, words) for each in subjects]
    for subject, names in rosters:
        files.prepare(subject, names, settings.threads, say)
    memories = [
        measure_memory(*given, settings, ids) if memory else [] for given, ids in zip(rosters, tokens, strict=True)
    ]
    torch.set_num_threads(settings.threads)
    for (subject, names), ids, weighed in zip(rosters, tokens, memories, strict=True):
        yield measure(subject, names, settings, ids, weighed)


def _listed(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


if __name__ == "__main__":
    main()
