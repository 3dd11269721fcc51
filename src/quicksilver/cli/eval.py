"""`quicksilver eval`: measure plans against the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quicksilver.cli.common import display_name, model_options, open_model, progress, resolve_plans
from quicksilver.cli.recipes import CALIBRATION_HELP, read_calibration, ready
from quicksilver.errors import InputError

_DEFAULT_CONTEXT = 2048


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--text", type=click.Path(), help="One long UTF-8 text.")
@click.option("--documents", type=click.Path(), help='JSON lines with a "text" field; each scored on its own.')
@click.option("--dataset", help="wikitext-103, wikitext-2 or c4, through the hub.")
@click.option("--plan", "plans", multiple=True, help="A preset's name or a plan file; may be repeated.")
@click.option("--mode", type=click.Choice(["score", "decode"]), default="score", show_default=True)
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window (default: the model's, at most 2048).")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens between windows (default: half the context; with --prompt, all that follow it).",
)
@click.option(
    "--prompt", type=click.IntRange(min=1), help="Feed the first N tokens of each window as a prompt, unscored."
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the first N tokens of the text.")
@click.option("--calibration", type=click.Path(), help=CALIBRATION_HELP)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the results to this file.")
@model_options
def command(
    model: str,
    text: str | None,
    documents: str | None,
    dataset: str | None,
    plans: tuple[str, ...],
    mode: Any,
    context: int | None,
    stride: int | None,
    prompt: int | None,
    max_tokens: int | None,
    calibration: str | None,
    json_path: str | None,
    dtype: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure plans against the dense MODEL, in the same run, on the same windows.

    MODEL is an embedded model's name, a local folder, or an id on the hub.

    \b
    Examples:
      quicksilver eval ref-llama --text book.txt --plan paper
      quicksilver eval ./my-gpt2 --documents c4.jsonl --plan settled --plan mine.json --json out.json
      quicksilver eval ref-llama --text book.txt --plan settled --mode decode --max-tokens 5000
      quicksilver eval ref-llama --text book.txt --plan fused-prompt --prompt 448 --context 512
      quicksilver eval ref-llama --text book.txt --plan channel-5bit --calibration other-book.txt
    """
    from quicksilver.cli.table import print_table
    from quicksilver.core.files import check_target, write_atomically
    from quicksilver.measure.report import evaluate
    from quicksilver.measure.windows import cut

    if json_path is not None:
        check_target("--json", json_path)
    chosen = resolve_plans(plans or ("dense",), model)
    corpus, calibration_corpus = _corpus(text, documents, dataset), read_calibration(calibration, chosen)
    loaded, tokenizer = open_model(model, "dense", dtype, device, threads)
    protocol = _protocol(loaded.adapter.spec.max_positions, tokenizer, context, stride, prompt, max_tokens)
    windowed, name = cut(corpus, tokenizer, protocol), display_name(model)
    nested, chosen = ready(loaded, name, chosen, tokenizer, calibration_corpus)
    with progress("windows", len(windowed.windows)) as advance:
        results = evaluate(loaded, chosen, windowed, protocol, mode, name, advance, nested)
    print_table(results)
    if json_path is not None:
        write_atomically(Path(json_path), json.dumps(results, indent=2) + "\n")


def _protocol(
    limit: int, tokenizer: Any, context: int | None, stride: int | None, prompt: int | None, max_tokens: int | None
) -> Any:
    """Return how the text is cut, with the defaults that a model's context of `limit` tokens gives."""
    from quicksilver.measure.windows import Protocol, default_bos

    if context is not None and context > limit:
        raise InputError(f"--context {context} is longer than the model's context of {limit}")
    context, bos_id = context or min(limit, _DEFAULT_CONTEXT), default_bos(tokenizer)
    stride = stride or max(context // 2 if prompt is None else context - (bos_id is not None) - prompt, 1)
    return Protocol(context, stride, bos_id, max_tokens, prompt)


def _corpus(text: str | None, documents: str | None, dataset: str | None) -> Any:
    from quicksilver.measure.texts import read_dataset, read_documents, read_text

    given = [(read_text, text), (read_documents, documents), (read_dataset, dataset)]
    chosen = [(read, value) for read, value in given if value is not None]
    if len(chosen) != 1:
        raise InputError("give exactly one of --text, --documents and --dataset")
    read, value = chosen[0]
    return read(value)
