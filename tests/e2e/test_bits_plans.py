"""Plans that choose bits, at the command line: fitted plans run, and dense stays the model as it was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quicksilver.plan import Plan
from tests import tiny
from tests.e2e.conftest import Outcome, assert_refusal

Cli = Callable[..., Outcome]
Measure = Callable[..., list[dict[str, Any]]]
TIMES = ("seconds", "tokens_per_second", "speedup")


def timeless(side: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in side.items() if key not in TIMES}


@pytest.fixture
def measure(cli: Cli, tiny_model_dir: Any, text_file: Path, tmp_path: Path) -> Measure:
    """Return a function that evaluates plans on a tiny model, plain unless a folder is given."""

    def run(*plans: object, family: str = "llama", folder: Path | None = None) -> list[dict[str, Any]]:
        model, target = folder or tiny_model_dir(family), tmp_path / "out.json"
        options = [word for plan in plans for word in ("--plan", plan)]
        if "channel-5bit" in plans:
            options += ["--calibration", text_file]
        arguments = ("--text", text_file, "--context", 32, "--json", target)
        done = cli("eval", model, *arguments, *options)
        assert done.status == 0, done.err
        return json.loads(target.read_text())

    return run


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_dense_is_the_plain_model_beside_plans_that_choose_widths(measure: Measure, family: str) -> None:
    (alone,) = measure("dense", family=family)
    dense, narrow, fitted = measure("dense", "uniform-4bit", "channel-5bit", family=family)
    for row in (dense, narrow, fitted):
        assert timeless(row["dense"]) == timeless(alone["dense"])
        assert row["model"] == alone["model"]
        assert row["model"]["weight_bits"] == 32
    assert timeless(dense["accelerated"]) == timeless(alone["accelerated"])
    assert timeless(dense["delta"]) == timeless(alone["delta"])
    assert dense["delta"]["nll"] == dense["delta"]["kl"] == dense["delta"]["bitops_reduction"] == 0.0
    assert dense["delta"]["top1_agreement"] == 1.0
    for row, bits in ((narrow, 4.0), (fitted, 5.0)):
        assert row["delta"]["kl"] > 0.0
        assert row["delta"]["bitops_reduction"] > 0.0
        assert row["accelerated"]["mean_bits"] == pytest.approx(bits, abs=0.5)  # some tokens are protected


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_plan_that_was_fitted_runs(
    cli: Cli,
    measure: Measure,
    tiny_model_dir: Any,
    text_file: Path,
    tmp_path: Path,
    family: str,
) -> None:
    folder, target = tmp_path / "quantized", tmp_path / "mine.json"
    assert cli("quantize", tiny_model_dir(family), "-o", folder).status == 0
    made = cli("plan", "fit", folder, "channel-5bit", "--calibration", text_file, "-o", target)
    assert (made.status, made.said) == (0, [])
    plan = Plan.load(target)
    assert not plan.is_recipe
    assert made.out.splitlines()[-1] == f"{target}: written, hash {plan.hash}"
    (row,) = measure(target, folder=folder)
    assert row["plan"]["hash"] == plan.hash
    assert row["model"]["weight_bits"] == 8
    (same,) = measure("channel-5bit", folder=folder)  # fitted on the way
    assert same["plan"]["hash"] == plan.hash
    assert timeless(same["accelerated"]) == timeless(row["accelerated"])
    generated = cli("generate", folder, "The river", "--plan", target, "--max-new-tokens", 3)
    assert (generated.status, generated.said) == (0, [])


def test_a_recipe_that_could_not_run_is_not_fitted(
    cli: Cli, tiny_model_dir: Any, plan_file: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    rule = {"type": "entropy", "target": [0.5, 0.3, 0.2], "layer": 4}
    recipe, target = plan_file("late.json", name="late", precision={"rule": rule}), tmp_path / "mine.json"
    folder = tmp_path / "quantized"
    assert cli("quantize", tiny_model_dir("llama"), "-o", folder).status == 0
    refusal = cli("plan", "fit", folder, recipe, "--calibration", text_file, "-o", target)
    assert_refusal(refusal, "late", "save nothing, the model has 4")
    assert not target.exists()
