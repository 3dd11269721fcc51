"""`quicksilver calibrate`: find the cheapest plan inside a budget of perplexity, and verify it on unseen text."""

import math
import os
import sys
from pathlib import Path
from typing import Any, get_args

import click

from quicksilver.calibrate.mechanisms import MECHANISMS, Objective
from quicksilver.cli import common
from quicksilver.errors import InputError

NOTHING_HELD = 3


@click.command("calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@common.text_options
@click.option("--max-delta-ppl", type=click.FloatRange(0, min_open=True), help="Most perplexity that may be added.")
@click.option("--max-delta-nll", type=click.FloatRange(0, min_open=True), help="Most nats per token, instead.")
@click.option("--minimise", type=click.Choice(get_args(Objective)), default="flops", show_default=True)
@click.option("--mechanisms", default="halting,kv,fusion,precision", show_default=True, help="Those that may be used.")
@click.option("--trials", type=click.IntRange(min=1), default=60, show_default=True, help="Candidates to score.")
@click.option("--time-limit", type=click.FloatRange(0, min_open=True), help="Seconds after which the search stops.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--context", type=click.IntRange(min=8), help="Tokens of a window (default: the model's, at most 2048).")
@click.option("--prompt", type=click.IntRange(min=1), help="Feed the first N tokens of each window as a prompt.")
@click.option(
    "--search-tokens", type=click.IntRange(min=64), default=12288, show_default=True, help="Scored each time."
)
@click.option(
    "--verify-tokens", type=click.IntRange(min=64), help="Held out (default: half as many again as searched)."
)
@click.option("--work", type=click.Path(file_okay=False), help="Folder that keeps what was found (default: PLAN.work).")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="The plan file to write.")
@click.option("--force", is_flag=True, help="Overwrite what a calibration wrote there before.")
@common.model_options
def command(**options: Any) -> None:
    """Find the cheapest plan for MODEL whose loss stays inside a budget, and verify it on text it was not chosen on.

    The budget is met when the upper end of the 95 % interval is inside it. The text is cut in three: to fit maps and
    thresholds, to compare candidates, and to verify. Of several texts each is cut so, and the budget must hold on each;
    without any, a text is sampled from the model. Beside PLAN.json come PLAN.safetensors (what was fitted),
    PLAN.frontier.json, .png and .svg, and the folder PLAN.work, which keeps what was found: after an interruption the
    same command goes on; another budget may share it with --work. Exit status 3: no plan held, dense is written.

    \b
    Examples:
      quicksilver calibrate ref-llama --text book.txt --max-delta-nll 0.01 -o mine.json
      quicksilver calibrate ./my-gpt2 --max-delta-ppl 0.2 --minimise bitops --mechanisms precision -o mine.json
      quicksilver calibrate ref-llama --text book.txt --prompt 448 --context 512 --max-delta-ppl 0.2 -o mine.json
    """
    for name in ("max_delta_ppl", "max_delta_nll", "time_limit"):
        if not math.isfinite(options[name] or 0.0):
            raise InputError(f"--{name.replace('_', '-')} must be a finite number, got {options[name]}")
    budget = _budget(options["max_delta_ppl"], options["max_delta_nll"])
    output = _output(options["output"], options["force"])
    source = click.get_current_context().get_parameter_source("mechanisms")
    is_given = source is not click.core.ParameterSource.DEFAULT
    names = _mechanisms(options["mechanisms"], options["prompt"], explicit=is_given)
    _check_work(options["work"], output)
    common.check_window_options(options["context"], prompt=options["prompt"])
    corpora = common.read_texts(options["text"], options["documents"], options["dataset"])
    model, tokenizer = common.open_model(
        options["model"], "dense", options["dtype"], options["device"], options["threads"]
    )
    from quicksilver.cli.calibration import run

    held = run(model, tokenizer, common.display_name(options["model"]), corpora, options, budget, names, output)
    if not held:
        sys.exit(NOTHING_HELD)


def _budget(ppl: float | None, nll: float | None) -> tuple[float, str]:
    if (ppl is None) == (nll is None):
        raise InputError("give exactly one of --max-delta-ppl and --max-delta-nll")
    return (ppl, "ppl") if ppl is not None else (nll or 0.0, "nll")


def _output(path: str, force: bool) -> Path:
    from quicksilver.core.files import check_target

    check_target("-o", path)
    output = Path(path)
    if output.suffix != ".json":
        raise InputError(f"-o {path}: a plan file ends in .json")
    for each in (output, output.with_suffix(".safetensors")):  # what was fitted lies beside the plan
        if each.exists() and not force:
            raise InputError(f"-o {path}: {each.name} exists already; --force overwrites it")
    return output


def _check_work(work: str | None, output: Path) -> None:
    """Refuse a folder that cannot be made to keep what is found."""
    if work is not None and not Path(work).absolute().parent.is_dir():
        raise InputError(f"--work {work}: the folder it would be in does not exist")
    folder = output.with_suffix(".work") if work is None else Path(work)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder}: cannot make the folder: there is a file of that name")


def _mechanisms(given: str, prompt: int | None, explicit: bool) -> tuple[str, ...]:
    """Return what may be used; fusion, which acts on prompts alone, only where windows have one."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in MECHANISMS]
    if unknown or not names:
        raise InputError(f"--mechanisms {given!r}: choose from {', '.join(MECHANISMS)}")
    if "fusion" in names and prompt is None:
        if explicit:
            raise InputError("--mechanisms fusion acts on prompts: give --prompt N, or leave fusion out")
        names.remove("fusion")
    return tuple(dict.fromkeys(names))
