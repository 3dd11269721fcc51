"""What a calibration found, as JSON-ready values and as short tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quicksilver.calibrate.choosing import eligible
from quicksilver.calibrate.pipeline import Calibration, Settings
from quicksilver.calibrate.scoring import saved
from quicksilver.calibrate.search import Scored, pareto

FORMAT = 1


def frontier(result: Calibration, settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all that was scored, what was chosen of it, and how it held on held-out text.

    Args:
        result: of the calibration.
        settings: that it was asked with.
        facts: of the command, the text and the machine, recorded as they are.
    """
    best = {id(each) for each in pareto(result.candidates, settings.objective, settings.budget)}
    holding = {id(each) for each in eligible(result.candidates, settings.objective, settings.budget)}
    verified = result.verified
    return {
        "format": FORMAT,
        **facts,
        "budget": asdict(settings.budget),
        "minimise": settings.objective,
        "mechanisms": list(settings.mechanisms),
        "trials": settings.trials,
        "seed": settings.seed,
        "chosen": result.plan.to_dict(),
        "verification": {
            "held": verified.row,
            "failed": [row for _, row in verified.failed],
        },
        "leave_one_out": [{"without": name, **summary(row, settings)} for name, row in result.leave_one_out.items()],
        "candidates": [
            {
                "group": each.group,
                "candidate": None if each.candidate is None else asdict(each.candidate),
                "on_frontier": id(each) in best,
                "within_budget": id(each) in holding,
                **summary(each.row, settings),
                "plan_hash": each.row["plan"]["hash"],
            }
            for each in result.candidates
        ],
    }


def summary(row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the figures of a candidate that a frontier is made of."""
    delta, kept = row["delta"], row["accelerated"]
    names = [name for name in delta if name.endswith(("_reduction", "_reduction_8bit"))]
    return {
        "tokens_scored": row["tokens_scored"],
        "dense_bits_per_byte": row["dense"]["bits_per_byte"],
        "delta": {key: delta[key] for key in ("ppl", "ppl_ci95", "nll", "nll_ci95", "kl", "top1_agreement")},
        "delta_by_text": row["delta_by_text"],
        "saved": saved(row, settings.objective),
        **{name: delta[name] for name in names},
        "mean_depth": kept["mean_depth"],
        "mean_bits": kept["mean_bits"],
        "width_histogram": kept["width_histogram"],
    }


def best_of_groups(candidates: Sequence[Scored], settings: Settings) -> dict[str, Scored]:
    """Return for each group of candidates the one that saves most inside the budget where it was searched."""
    best: dict[str, Scored] = {}
    for each in candidates:
        inside = settings.budget.holds(each.row)
        if inside and (
            each.group not in best
            or saved(each.row, settings.objective) > saved(best[each.group].row, settings.objective)
        ):
            best[each.group] = each
    return best
