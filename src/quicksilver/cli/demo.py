"""`quicksilver demo`: the main job on what comes with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from quicksilver.cli.common import check_model, display_name, open_model, progress
from quicksilver.cli.recipes import ready
from quicksilver.errors import InputError, ModelError

_TIME = "Time is not saved in windows yet: plans save work there, not seconds."
_CALIBRATED = (
    "`mild` and `strong` are calibrated, to lose at most 0.010 and 0.036 nats; `paper`\n"
    "is the published rule, literally; the others are not calibrated: docs/results."
)


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", default="quicksilver-demo", show_default=True, help="Folder for the pictures and the JSON.")
@click.option(
    "--max-tokens", type=click.IntRange(min=100), default=6000, show_default=True, help="Tokens of text used."
)
@click.option("--model", "models", multiple=True, help="Use this model instead of the embedded ones; may be repeated.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: PyTorch's).")
def command(output: str, max_tokens: int, models: tuple[str, ...], threads: int | None) -> None:
    """Measure the embedded models on the embedded articles, generate a sample, and draw the result.

    \b
    Examples:
      quicksilver demo
      quicksilver demo --output results --max-tokens 20000
    """
    from quicksilver.core.files import check_folder
    from quicksilver.core.sources import embedded_models

    names = models or tuple(embedded_models())
    if not names:
        raise ModelError("this installation holds no embedded model; pass one with --model")
    check_folder("--output", output)
    for name in names:
        check_model(name)
    folder = Path(output)
    for name in names:
        _measure(name, folder, max_tokens, threads)


def _measure(name: str, folder: Path, max_tokens: int, threads: int | None) -> None:
    """Measure one model, print its tables and a sample, write the picture and the figures."""
    model, tokenizer = open_model(name, "dense", None, "cpu", threads)
    from quicksilver.cli.table import print_table
    from quicksilver.measure import demo
    from quicksilver.measure.scoring import num_runs
    from quicksilver.plan import Plan
    from quicksilver.plan.presets import calibrated_plans, resolve_plan

    halting, fusing = demo.parts(tokenizer, model.adapter.spec.max_positions, max_tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot make the folder: {error.strerror or error}") from None
    calibrated = [resolve_plan(plan, name) for plan in calibrated_plans() if plan.startswith(f"{name}/")]
    plans = [*calibrated, *map(Plan.preset, demo.BITS_PLANS), *halting.plans]
    quantized, fitted = ready(model, display_name(name), plans, tokenizer, None)
    measured = (replace(halting, plans=tuple(fitted)), fusing)
    with progress(name, sum(num_runs(len(part.text.windows)) for part in measured)) as advance:
        results, picture = demo.run(model, tokenizer, display_name(name), measured, folder, advance, quantized)
    for rows in results:
        print_table(rows, legend=rows is results[-1])
    print(_TIME)
    if calibrated:
        print(_CALIBRATED)
    strongest = [plan for plan in fitted if plan in calibrated][-1:]
    runner, plan = (quantized, strongest[0]) if quantized and strongest else (model, demo.shallowest(results[0]))
    sample = demo.sample(runner, tokenizer, plan)
    saved = f"{sample.stats.flops_reduction:.1%} of the FLOPs saved"
    print(f"\nGenerated under plan '{sample.plan}' ({saved}):\n  {sample.text}\n")
    print(f"Picture: {picture}\nFigures: {picture.with_suffix('.json')}\n")
