"""Options and output that several subcommands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

DTYPES = ("float32", "bfloat16", "float16", "auto")


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --dtype, --device and --threads."""
    options = (
        click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on the CPU, else the model's own."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto."),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: PyTorch's)."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def open_model(model: str, plan: Any, dtype: str | None, device: str, threads: int | None) -> tuple[Any, Any]:
    """Load a model under a plan, and its tokenizer."""
    quiet_transformers()
    import torch

    from quicksilver.runtime.loading import load, load_tokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    return load(model, plan, dtype, device), load_tokenizer(model)


def calibration_windows(corpus: Any, tokenizer: Any, max_positions: int, context: int, max_tokens: int) -> Any:
    """Return windows of calibration text that do not overlap, of `context` tokens or the model's limit."""
    from quicksilver.measure.windows import Protocol, cut, default_bos

    bos_id, context = default_bos(tokenizer), min(max_positions, context)
    return cut(corpus, tokenizer, Protocol(context, max(context - (bos_id is not None), 1), bos_id, max_tokens)).windows


def display_name(model: str) -> str:
    """Return a model's name for tables: the folder's own name, or the id as given."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def quiet_transformers() -> None:
    """Silence transformers' progress bars and advice, which would interleave with our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr where that is a terminal; yield the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
