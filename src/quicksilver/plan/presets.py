"""From a name to a plan: presets, those calibrated to embedded models among them, and files."""

import os
from pathlib import Path

from quicksilver.core.sources import check_model
from quicksilver.errors import PlanError
from quicksilver.plan import PRESETS, Plan

CALIBRATED = Path(__file__).parent.parent / "data" / "plans"


def resolve_plan(plan: Plan | str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Plan:
    """Return a plan from itself, a preset's name, or a file.

    Args:
        plan: any of these. A preset that is calibrated to an embedded model is called MODEL/NAME, such as
            "ref-llama/mild", and keeps that name where MODEL is not the one that will run it.
        model: the embedded model that will run it, so that NAME alone will do.

    Raises:
        PlanError: neither a preset nor a readable plan file.
        ModelError: a preset of an embedded model is asked for, and there is no such model.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise PlanError(f"a plan is a Plan, a preset's name or a file, not {type(plan).__name__}")
    if isinstance(plan, str) and plan in PRESETS:
        return PRESETS[plan]
    calibrated = calibrated_plans()
    for name in (plan, f"{model}/{plan}"):
        if isinstance(name, str) and name in calibrated:
            owner, _, short = name.rpartition("/")
            return Plan.load(CALIBRATED / f"{name}.json").renamed(short if str(model) == owner else name)
    if _is_file(plan):
        loaded = Plan.load(plan)
        return loaded.renamed(Path(plan).stem) if loaded.name in ("plan", "calibrated") else loaded
    if isinstance(plan, str) and plan in {name.rpartition("/")[2] for name in calibrated}:
        if model is not None:
            check_model(model)  # a misspelt model is not the plan's fault
        raise PlanError(
            f"preset {plan} is calibrated to a model: {', '.join(n for n in calibrated if n.endswith(f'/{plan}'))}."
            " Give one of these names if your folder holds that model; else the shell command `quicksilver calibrate`"
            " writes a plan file for yours, to be given instead"
        )
    if not isinstance(plan, str) or plan.endswith(".json"):
        raise PlanError(f"{plan}: {'is not a plan file' if os.path.exists(plan) else 'there is no such file'}")
    raise PlanError(f"{plan}: neither a preset ({', '.join((*PRESETS, *calibrated))}) nor a plan file")


def calibrated_plans() -> list[str]:
    """Return the names of the presets that are calibrated to embedded models, MODEL/NAME each."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in CALIBRATED.glob("*/*.json"))


def _is_file(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).is_file()
    except PermissionError as error:
        raise PlanError(f"{path}: cannot read the plan: {error.strerror}") from None
    except (OSError, ValueError):  # too long a name, or one with a null character
        return False
