"""`quicksilver eval`: measure plans against the dense model."""

import json
from pathlib import Path
from typing import Any

import click

from quicksilver.cli import common
from quicksilver.cli.recipes import CALIBRATION_HELP, read_calibration, ready
from quicksilver.errors import InputError


def _explain(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print what the columns mean, and nothing else, where that is wanted."""
    if wanted:
        from quicksilver.cli.table import EXPLANATION

        click.echo(EXPLANATION)
        context.exit()


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@common.text_options
@click.option("--plan", "plans", multiple=True, help="A preset's name or a plan file; may be repeated.")
@click.option("--mode", type=click.Choice(["score", "decode"]), default="score", show_default=True)
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window (default: the model's, at most 2048).")
@click.option("--stride", type=click.IntRange(min=1), help="Between windows (default: half, or all after --prompt).")
@click.option("--prompt", type=click.IntRange(min=1), help="Feed the first N tokens of each window as a prompt.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the first N tokens of the text.")
@click.option("--calibration", type=click.Path(), help=CALIBRATION_HELP)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the results to this file.")
@click.option(
    "--explain",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Explain the tables' columns and exit.",
)
@common.model_options
@common.kernels_option
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
    kernels: Any,
    **loading: Any,
) -> None:
    """Measure plans against the dense MODEL, in the same run, on the same windows.

    MODEL is an embedded model's name, a local folder, a GGUF file, or an id on the hub.

    \b
    Examples:
      quicksilver eval ref-llama --text book.txt --plan paper
      quicksilver eval ./my-gpt2 --documents c4.jsonl --plan settled --plan mine.json --json out.json
      quicksilver eval ref-llama --text book.txt --plan settled --mode decode --max-tokens 5000
      quicksilver eval ref-llama --text book.txt --plan fused-prompt --prompt 448 --context 512
      quicksilver eval ref-llama --text book.txt --plan channel-5bit --calibration other-book.txt
    """
    from quicksilver.core.files import check_target, write_atomically
    from quicksilver.measure.windows import cut, default_bos

    if json_path is not None:
        check_target("--json", json_path)
    chosen = common.resolve_plans(plans or ("dense",), model)
    if (text, documents, dataset).count(None) != 2:
        raise InputError("give exactly one of --text, --documents and --dataset")
    (corpus,) = common.read_texts(text, documents, dataset)
    calibration_corpus = read_calibration(calibration, chosen)
    common.check_window_options(context, stride, prompt, None if corpus.separate else max_tokens)
    loaded, tokenizer = common.open_model(model, "dense", **loading, kernels=kernels)
    from quicksilver.cli.table import print_table
    from quicksilver.measure.report import evaluate
    from quicksilver.measure.scoring import num_runs

    limit, bos_id = loaded.adapter.spec.max_positions, default_bos(tokenizer)
    window_config = common.window_protocol(limit, bos_id, context, stride, prompt, max_tokens)
    windowed, name = cut(corpus, tokenizer, window_config), common.display_name(model)
    quantized, chosen = ready(loaded, name, chosen, tokenizer, calibration_corpus)
    common.check_kernels(kernels, model, loaded, quantized)
    with common.progress("windows", num_runs(len(windowed.windows))) as advance:
        results = evaluate(loaded, chosen, windowed, window_config, mode, name, advance, quantized)
    print_table(results)
    if json_path is not None:
        write_atomically(Path(json_path), json.dumps(results, indent=2) + "\n")
