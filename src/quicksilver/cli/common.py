"""Options and output that several subcommands share."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

from quicksilver.errors import InputError

_DEFAULT_CONTEXT = 2048
_REPORT_SECONDS = 20.0  # between lines of progress where there is no terminal
DTYPES = ("float32", "bfloat16", "float16", "auto")


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda function: reduce(lambda decorated, option: option(decorated), reversed(options), function)


device_options = _options(
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto."),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: PyTorch's)."),
)
model_options = _options(
    click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on the CPU, else the model's own."),
    device_options,
)
kernels_option = click.option(
    "--kernels",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    show_default=True,
    help="What reads any-precision weights: compiled kernels where they can, these or nothing, or PyTorch.",
)
text_options = _options(
    click.option("--text", type=click.Path(), help="One long UTF-8 text."),
    click.option("--documents", type=click.Path(), help='JSON lines with a "text" field; each scored on its own.'),
    click.option("--dataset", help="wikitext-103, wikitext-2 or c4, through the hub."),
)


def read_texts(text: str | None, documents: str | None = None, dataset: str | None = None) -> list[Any]:
    """Return the corpora that `text_options` name, in their order."""
    from quicksilver.measure.texts import read_dataset, read_documents, read_text

    given = ((read_text, text), (read_documents, documents), (read_dataset, dataset))
    with own_lines():
        return [read(value) for read, value in given if value is not None]


def window_protocol(
    limit: int,
    bos_id: int | None,
    context: int | None = None,
    stride: int | None = None,
    prompt: int | None = None,
    max_tokens: int | None = None,
) -> Any:
    """Return how a text is cut, with the defaults of a context of `limit` tokens; InputError where numbers clash."""
    from quicksilver.measure.windows import WindowConfig

    if context is not None and context > limit:
        raise InputError(f"--context {context} is longer than the model's context of {limit}")
    context = context or min(limit, _DEFAULT_CONTEXT)
    stride = stride or max(context // 2 if prompt is None else context - (bos_id is not None) - prompt, 1)
    return WindowConfig(context, stride, bos_id, max_tokens, prompt)


def check_window_options(
    context: int | None, stride: int | None = None, prompt: int | None = None, max_tokens: int | None = None
) -> None:
    """Refuse, before a model is loaded, options that do not fit one another under any."""
    if context is None:
        return
    window_protocol(context, None, context, stride, prompt)
    if max_tokens is not None and max_tokens < context - 1:
        raise InputError(f"--max-tokens {max_tokens} is less than one window of --context {context}")


def open_model(
    model: str, plan: Any, dtype: str | None, device: str, threads: int | None, kernels: Any = "auto"
) -> tuple[Any, Any]:
    """Load a model under a plan, and its tokenizer; say where the plan was fitted to another model."""
    from quicksilver.plan.presets import resolve_plan

    plan = resolve_plan(plan, model)
    prepare(model, device, threads)
    from quicksilver.loading.load import load, load_tokenizer

    with own_lines():
        loaded, tokenizer = load(model, plan, dtype, device, kernels=kernels), load_tokenizer(model)
    warn_fitted_elsewhere(loaded.plan, loaded)
    return loaded, tokenizer


def prepare(model: str, device: str, threads: int | None) -> None:
    """Refuse a MODEL that is not there and a --device that is none; then import what takes seconds, saying so."""
    from quicksilver.core import sources

    sources.check_device(device)
    sources.check_model(model)
    if sys.stderr.isatty():
        print(f"quicksilver: loading {model} ...", file=sys.stderr)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()  # progress bars and advice would interleave with our own output
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def check_kernels(kernels: str, model: str, *runs: Any) -> None:
    """Refuse --kernels native where none of the models that run has any-precision weights for them to read."""
    if kernels == "native" and not any(run is not None and run.adapter.spec.is_quantized for run in runs):
        raise InputError(
            f"--kernels native: {model} is not quantized, and these kernels read quantized weights only; quantize it"
            " with `quicksilver quantize`, or name a plan that chooses bits"
        )


@contextmanager
def own_lines() -> Iterator[None]:
    """Say on lines of our own, on stderr, what the library warns of as it reads; others' warnings pass through."""
    from quicksilver import errors

    notes = (
        errors.ByteOrderMarkWarning,
        errors.KernelsMissingWarning,
        errors.TokenizerWarning,
        errors.WeightFilesWarning,
    )
    with warnings.catch_warnings(record=True) as caught:
        for category in notes:
            warnings.simplefilter("always", category)
        warnings.simplefilter("ignore", errors.FittedElsewhereWarning)  # `warn_fitted_elsewhere` says it
        yield
    said = set()
    for warning in caught:  # an error stands alone: it is one line
        if str(warning.message) in said:  # a file that is opened for its weights, and for its tokenizer
            continue
        said.add(str(warning.message))
        if issubclass(warning.category, notes):
            print(f"quicksilver: note: {warning.message}", file=sys.stderr)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def resolve_plans(given: Sequence[str], model: str) -> list[Any]:
    """Return the plans for a model of presets' names and files, those of one name told apart by file, else by hash."""
    from quicksilver.plan import PRESETS
    from quicksilver.plan.presets import resolve_plan

    plans = [resolve_plan(each, model) for each in given]
    names = Counter(["dense", *(plan.name for plan in plans)])  # the baseline's row is called dense
    labels = [
        plan.name if names[plan.name] == 1 or source in PRESETS else f"{plan.name} ({Path(source).name})"
        for source, plan in zip(given, plans, strict=True)
    ]
    taken = Counter(labels)
    return [
        plan.renamed(label if taken[label] == 1 else f"{label} {plan.hash[:8]}")
        for label, plan in zip(labels, plans, strict=True)
    ]


def warn_fitted_elsewhere(plan: Any, model: Any) -> None:
    """Print a warning where a plan's thresholds were fitted to another model than the one that runs it."""
    from quicksilver.loading.load import check_fitted_to

    problem = check_fitted_to(plan, model.model, model.adapter)
    if problem is not None:
        print(f"quicksilver: WARNING: {problem}", file=sys.stderr)


def calibration_windows(
    corpus: Any, tokenizer: Any, max_positions: int, context: int, max_tokens: int
) -> tuple[list[tuple[int, ...]], int]:
    """Cut calibration text, however short, into windows that do not overlap, of at most `context` tokens each.

    Returns:
        The windows' token ids, and how many tokens of the text they hold: BOS is not of the text.

    Raises:
        InputError: fewer than two tokens of text.
    """
    from quicksilver.measure.windows import WindowConfig, cut, default_bos

    bos_id, context = default_bos(tokenizer), min(max_positions, context)
    window_config = WindowConfig(context, max(context - (bos_id is not None), 1), bos_id, max_tokens)
    try:
        windows = cut(replace(corpus, separate=True), tokenizer, window_config).windows
    except InputError:
        raise InputError(f"--calibration: {corpus.name} holds fewer than 2 tokens") from None
    return [w.token_ids for w in windows], sum(len(w.token_ids) - (bos_id is not None) for w in windows)


def display_name(model: str) -> str:
    """Return a model's name for tables: the folder's own name, or the id as given."""
    return Path(model).resolve().name if Path(model).exists() else model


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on stderr, a bar on a terminal, else a line now and then; yield the function that advances it."""
    if not sys.stderr.isatty():
        yield _lines(label, total)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _lines(label: str, total: int) -> Callable[[], None]:
    """Return a function that counts, and prints now and then how far it is and how long the rest may take."""
    begin = last = time.monotonic()
    done = 0

    def count() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last = now
            left = (now - begin) / done * (total - done)
            print(f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return count
