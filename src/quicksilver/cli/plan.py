"""`quicksilver plan`: list presets, show a plan as JSON, validate a plan file, fit a recipe."""

from __future__ import annotations

import os

import click

from quicksilver.cli.common import display_name, model_options, open_model
from quicksilver.cli.recipes import CALIBRATION_HELP, read_calibration, ready

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group("plan", context_settings=_HELP)
def command() -> None:
    """List, show, validate and fit plans.

    \b
    Examples:
      quicksilver plan list
      quicksilver plan show paper > mine.json
      quicksilver plan validate mine.json
      quicksilver plan fit ref-llama channel-5bit --calibration book.txt -o mine.json
    """


@command.command("list", context_settings=_HELP)
def list_plans() -> None:
    """Print the presets, one name per line.

    \b
    Examples:
      quicksilver plan list
    """
    from quicksilver.plan import PRESETS
    from quicksilver.plan.presets import calibrated_plans

    for name in (*PRESETS, *calibrated_plans()):
        print(name)


@command.command("show", context_settings=_HELP)
@click.argument("plan")
def show(plan: str) -> None:
    """Print PLAN (a preset's name or a file) as JSON, with its version and hash.

    \b
    Examples:
      quicksilver plan show paper > mine.json
    """
    from quicksilver.plan.presets import resolve_plan

    print(resolve_plan(plan).to_json())


@command.command("validate", context_settings=_HELP)
@click.argument("plan")
def validate(plan: str) -> None:
    """Check PLAN (a preset's name or a file); exit with status 2 and a reason where it is not valid.

    \b
    Examples:
      quicksilver plan validate mine.json
    """
    from quicksilver.plan.presets import resolve_plan

    resolved = resolve_plan(plan)
    print(f"{plan}: valid, hash {resolved.hash}")


@command.command("fit", context_settings=_HELP)
@click.argument("model")
@click.argument("plan")
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="The plan file to write.")
@click.option("--calibration", type=click.Path(), help=CALIBRATION_HELP)
@click.option("--force", is_flag=True, help="Replace the plan file where there is one.")
@model_options
def fit(
    model: str,
    plan: str,
    output: str,
    calibration: str | None,
    force: bool,
    dtype: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Fit the thresholds of PLAN, a recipe such as channel-5bit, to MODEL, and write the plan that can be run.

    They belong to the model with the weights it has: to those of a folder that `quicksilver quantize` wrote, if that
    is what will be run. The plan records them, and running it on others prints a warning.

    \b
    Examples:
      quicksilver plan fit ref-llama channel-5bit -o mine.json
      quicksilver plan fit ./quantized channel-5bit --calibration book.txt -o mine.json
    """
    from quicksilver.core.files import check_target
    from quicksilver.errors import InputError, PlanError
    from quicksilver.plan.presets import resolve_plan

    recipe = resolve_plan(plan, model)
    if not recipe.is_recipe:
        raise PlanError(f"plan {recipe.name!r} has all its thresholds; there is nothing to fit")
    check_target("-o", output)
    if os.path.isfile(output) and not force:
        raise InputError(f"-o {output}: exists already; give a new file, or --force")
    corpus = read_calibration(calibration, [recipe])
    loaded, tokenizer = open_model(model, "dense", dtype, device, threads)
    fitted = ready(loaded, display_name(model), [recipe], tokenizer, corpus)[1][0]
    fitted.save(output)
    print(f"{output}: written, hash {fitted.hash}")
