"""Fusion's similarities and weights at matched shares of fused tokens, against fusing at random.

Thresholds are found on calibration text; figures come from other text, where a threshold may fuse more or less:
random fusion is measured at several shares, and each plan is compared with it at the share the plan really fused.
Timing is not its subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from benchmarks.fusion_plans import SWEPT, WEIGHTS, Setting, Wanted, find_plans, wanted
from benchmarks.sweep import against_random, heading, interval, read_corpus, show_dot, text_options, write_results
from quicksilver import rules
from quicksilver.errors import InputError, QuickSilverError
from quicksilver.loading.load import load, load_tokenizer
from quicksilver.measure.report import build_rows
from quicksilver.measure.scoring import EngineRecord, run_windows
from quicksilver.measure.texts import Corpus
from quicksilver.measure.windows import Window, WindowConfig, WindowedText, cut, default_bos
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder

FusionMode = Literal["prompt", "score"]
SCOPES: dict[FusionMode, rules.FusionScope] = {"prompt": "prompt", "score": "all"}
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
NOTES: dict[FusionMode, str] = {
    "prompt": "Only what follows each window's prompt is scored, in one pass after it; that this equals feeding it one"
    " token at a time (decode) is held by a test. Share fused and FLOPs saved are the prompt's, KV bytes those held"
    " after the window. Of documents, only those longer than the prompt are used.",
    "score": "Every token is scored in one pass, absorbed ones from their own state at the fusion layer. Which state an"
    " absorbed token is scored from depends on the token after it, so these figures are not strictly free of"
    " look-ahead in the choice of the state, though no later token's content enters a state; figures of decode and"
    " of mode prompt are. The choice itself tells something: a similarity absorbs a token where the next is like it,"
    " and a shallow state that predicts its own token again can gain by that; random fusion tells nothing.",
}


class Material(NamedTuple):
    """Text to measure on with its protocol, and the calibration text's name and windows."""

    window_config: WindowConfig
    measured: WindowedText
    calibration: str
    windows: tuple[Window, ...]


def prepare(
    mode: FusionMode,
    tokenizer: Any,
    corpora: tuple[Corpus, Corpus],
    window_config: WindowConfig,
    calibration_tokens: int,
) -> Material:
    """Cut the text to measure on and the calibration text; the latter's windows are those fed, and do not overlap.

    Raises:
        InputError: a text is too short.
    """
    test, held = corpora
    bos = window_config.bos_id is not None
    if mode == "score" or window_config.prompt is None:
        calibration = WindowConfig(window_config.context, window_config.room, window_config.bos_id, calibration_tokens)
        return Material(
            window_config, cut(test, tokenizer, window_config), held.name, cut(held, tokenizer, calibration).windows
        )
    test, held = (_longer(corpus, tokenizer, window_config.prompt) for corpus in (test, held))
    calibration = WindowConfig(
        window_config.prompt + bos, window_config.prompt, window_config.bos_id, calibration_tokens
    )
    windows = cut(held, tokenizer, calibration).windows
    full = tuple(window for window in windows if len(window.token_ids) == calibration.context)
    return Material(window_config, cut(test, tokenizer, window_config), held.name, full)


def _longer(corpus: Corpus, tokenizer: Any, prompt: int) -> Corpus:
    """Return only those documents that are longer than a prompt, so that none counts without being scored."""
    if not corpus.separate:
        return corpus
    texts = tuple(x for x in corpus.texts if len(tokenizer(x, add_special_tokens=False).input_ids) > prompt)
    if not texts:
        raise InputError(f"{corpus.name}: no document is longer than a prompt of {prompt} tokens")
    return Corpus(corpus.name, texts, separate=True)


def measure(model: Any, name: str, mode: FusionMode, found: list[tuple[Wanted, Plan]], material: Material) -> list[Any]:
    """Return a row for each plan: as `eval` lays it out, and what was asked, got and compared."""
    plans = (Plan.dense(), *(plan for _, plan in found))
    decoders = [Decoder(model.adapter, plan, model.special_ids) for plan in plans]
    text = material.measured
    records = run_windows(decoders, text.windows, "score", show_dot)
    rows = build_rows(records, text, material.window_config, "score", name)
    got = [_fused(record, mode) for record in records[1:]]
    controls = against_random(records, got, [window.num_scored for window in text.windows])
    for row, (asked, _), share, control in zip(rows, found, got, controls, strict=True):
        row.update(
            fusion_mode=mode, share=asked.share, got=share, calibration=material.calibration, against_random=control
        )
    return rows


def _fused(record: EngineRecord, mode: FusionMode) -> float:
    return (record.prompt_trace if mode == "prompt" else record.trace).fused_fraction


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a run, the settings above it and what to mind below it."""
    first = rows[0]
    mode, fusion = first["fusion_mode"], first["plan"]["fusion"]
    fed = f" after a prompt of {first['protocol']['prompt']}" if mode == "prompt" else ""
    layers = ", ".join(map(str, fusion["layers"]))
    more = (
        f"{fed}; fusion after {layers} layers, groups of at most {fusion['max_group']}, scope {fusion['scope']}, first"
        f" {fusion['protect_first']} tokens protected; thresholds found on {first['calibration']}"
    )
    lines = [
        *heading(first, more),
        "| tokens fused: asked | got | similarity | weights | threshold | Δnll [95 % CI] | Δppl | KL | top-1"
        f" | {'prompt ' if mode == 'prompt' else ''}FLOPs saved | KV bytes saved"
        " | Δnll against random at the share got [95 % CI] |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_table_row, rows),
        "",
        NOTES[mode],
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    delta, control, rule = row["delta"], row["against_random"], row["plan"]["fusion"]["rule"]
    similarity, _, weights = row["plan"]["name"].partition("/")
    saved = row["accelerated"]["prompt"] if row["fusion_mode"] == "prompt" else delta
    return (
        f"| {row['share']:.1%} | {row['got']:.1%} | {similarity} | {weights}"
        f" | {rule.get('threshold', rule.get('probability')):.4g} | {interval(delta)} | {delta['ppl']:+.3f}"
        f" | {delta['kl']:.4f} | {delta['top1_agreement']:.1%} | {saved['flops_reduction']:+.1%}"
        f" | {delta['kv_used_bytes_reduction']:+.1%} | {'' if control is None else interval(control)} |"
    )


def _parse_layers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int | float, ...]:
    """Return layers from a list with commas: 4 is four layers, 1/3 and 0.33 are shares of the depth."""
    try:
        values = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} is no list of numbers") from None
    return tuple(int(value) if value.denominator == 1 else float(value) for value in values)


def fusion_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which plans are compared."""
    share = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)
    options = (
        click.option("--mode", type=click.Choice(list(SCOPES)), default="prompt", show_default=True),
        click.option("--fused", "shares", multiple=True, type=share, default=SHARES, show_default=True),
        click.option(
            "--weights-share",
            type=share,
            default=0.1,
            show_default=True,
            help=f"Share at which to compare {', '.join(WEIGHTS)}; the others have {SWEPT} alone.",
        ),
        click.option("--layers", default="1/3", show_default=True, callback=_parse_layers, help="E.g. 4, or 1/3,2/3."),
        click.option("--max-group", default=4, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@text_options
@fusion_options
@click.option("--prompt", default=448, show_default=True, help="Tokens fed before what is scored, in mode prompt.")
@click.option("--context", default=512, show_default=True)
@click.option("--max-tokens", default=10_000, show_default=True)
@click.option("--calibration-tokens", default=4096, show_default=True)
@click.option("-o", "--output", required=True, help="Results: OUTPUT.json and OUTPUT.md.")
def main(
    model: str,
    text: str | None,
    documents: str | None,
    calibration_text: str | None,
    calibration_documents: str | None,
    mode: FusionMode,
    shares: tuple[float, ...],
    weights_share: float,
    layers: tuple[int | float, ...],
    max_group: int,
    prompt: int,
    context: int,
    max_tokens: int,
    calibration_tokens: int,
    output: str,
) -> None:
    """Compare fusion's similarities and weights on MODEL at matched shares of fused tokens.

    \b
    Example:
      python -m benchmarks.fusion ref-llama --text test.txt --calibration-text holdout.txt -o fusion
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
        spec, bos_id = loaded.adapter.spec, default_bos(tokenizer)
        if context > spec.max_positions:
            raise InputError(f"a context of {context} is more than the model's {spec.max_positions}")
        setting = Setting.build(layers, max_group, SCOPES[mode], spec.num_layers)
        stride = context // 2 if mode == "score" else context - (bos_id is not None) - prompt
        window_config = WindowConfig(context, stride, bos_id, max_tokens, prompt if mode == "prompt" else None)
        corpora = read_corpus(text, documents), read_corpus(calibration_text, calibration_documents)
        material = prepare(mode, tokenizer, corpora, window_config, calibration_tokens)
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    found = find_plans(loaded, setting, wanted(shares, weights_share, max_group), material.windows)
    if not found:
        raise click.ClickException(f"no share can be reached on {material.calibration}")
    rows = measure(loaded, Path(model).name, mode, found, material)
    write_results(output, rows, markdown(rows))


if __name__ == "__main__":
    main()
