"""`quicksilver plan fit` and recipes in `eval`: what is written, what is recorded, when a warning is due."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quicksilver
from quicksilver.errors import FittedElsewhereWarning, PlanError
from quicksilver.plan import Plan
from tests.e2e.conftest import SENTENCES, Outcome, assert_refusal

Cli = Callable[..., Outcome]
Refused = Callable[..., str]
TinyModelDir = Callable[[str], Path]


@pytest.fixture
def fitted(cli: Cli, tiny_model_dir: TinyModelDir, text_file: Path, tmp_path: Path) -> Path:
    """A plan fitted to the tiny Llama with its weights quantized in memory."""
    path = tmp_path / "fitted.json"
    outcome = cli("plan", "fit", tiny_model_dir("llama"), "channel-5bit", "--calibration", text_file, "-o", path)
    assert (outcome.status, outcome.said) == (0, [])
    assert f"fitted to {len(SENTENCES * 3)} tokens of book.txt" in outcome.out
    return path


def test_a_plan_says_what_it_was_fitted_to(fitted: Path, tiny_model_dir: TinyModelDir) -> None:
    record = json.loads(fitted.read_text())["fitted_to"]
    assert len(record.pop("fingerprint")) == 16
    name = tiny_model_dir("llama").name
    assert record == {"model": name, "calibration": "book.txt", "tokens": len(SENTENCES * 3)}


def test_the_record_is_no_part_of_the_hash(fitted: Path) -> None:
    plan, data = Plan.load(fitted), json.loads(fitted.read_text())
    del data["fitted_to"]
    unrecorded = Plan.from_dict(data, tensors=plan.stored)  # would be refused if the hash in the file did not match
    assert unrecorded.hash == plan.hash
    assert unrecorded.fitted_to is None
    assert Plan.from_dict(plan.to_dict(), tensors=plan.stored) == plan


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (["llama"], "object"),
        ({"model": "llama"}, "fingerprint"),
        ({"model": "m", "fingerprint": 7, "calibration": "c", "tokens": 1}, "fingerprint"),
        ({"model": "m", "fingerprint": "f", "calibration": "c", "tokens": True}, "tokens"),
        ({"model": "m", "fingerprint": "f", "calibration": "c", "tokens": 1, "mood": "good"}, "mood"),
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense(record: Any, named: str) -> None:
    with pytest.raises(PlanError, match=rf"fitted_to.*{named}"):
        Plan.from_dict({"version": 2, "fitted_to": record})


def test_another_model_is_warned_of(
    cli: Cli, fitted: Path, tiny_model_dir: TinyModelDir, text_file: Path, tmp_path: Path
) -> None:
    options = ("--text", text_file, "--plan", fitted, "--context", 32)
    own = cli("eval", tiny_model_dir("llama"), *options)
    assert (own.status, own.said) == (0, [])
    other = cli("eval", tiny_model_dir("mistral"), *options)
    assert other.status == 0
    assert len(other.said) == 1
    for part in ("quicksilver: WARNING: plan 'channel-5bit'", "another model", tiny_model_dir("llama").name):
        assert part in other.err
    for family in ("llama", "mistral"):
        quantized = tmp_path / family
        assert cli("quantize", tiny_model_dir(family), "-o", quantized).status == 0
        outcome = cli("generate", quantized, "The river", "--max-new-tokens", 3, "--plan", fitted)
        assert outcome.status == 0
        assert ("WARNING" in outcome.err) == (family == "mistral")


def test_a_model_of_another_family_is_refused_without_a_warning_besides(
    cli: Cli, fitted: Path, tiny_model_dir: TinyModelDir, text_file: Path
) -> None:
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, "--plan", fitted, "--context", 32)
    assert outcome.out.startswith("weights quantized in memory")
    assert len(outcome.said) == 1
    assert "sets of thresholds" in outcome.err
    assert f"fitted to {tiny_model_dir('llama').name}" in outcome.err


def test_the_library_warns_too(cli: Cli, fitted: Path, tiny_model_dir: TinyModelDir, tmp_path: Path) -> None:
    for family in ("llama", "mistral"):
        assert cli("quantize", tiny_model_dir(family), "-o", tmp_path / family).status == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quicksilver.load(tmp_path / "llama", fitted)
    with pytest.warns(FittedElsewhereWarning, match="another model"):
        quicksilver.load(tmp_path / "mistral", fitted)


def test_a_fitted_plan_is_overwritten_only_by_force(
    cli: Cli, fitted: Path, tiny_model_dir: TinyModelDir, tmp_path: Path
) -> None:
    before = fitted.read_text()
    arguments = ("plan", "fit", tiny_model_dir("llama"), "channel-5bit", "-o", fitted)
    assert_refusal(cli(*arguments), fitted, "exists already", "--force")
    assert fitted.read_text() == before
    assert cli(*arguments, "--force").status == 0
    assert json.loads(fitted.read_text())["fitted_to"]["calibration"] == "sampled from the model (seed 0)"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["plan fit", "eval", "quantize"])
def test_a_short_calibration_text_will_do_but_not_a_token(
    cli: Cli, tiny_model_dir: TinyModelDir, text_file: Path, tmp_path: Path, command: str
) -> None:
    folder, short = tiny_model_dir("gpt2"), tmp_path / "short.txt"
    arguments = {
        "plan fit": ("plan", "fit", folder, "channel-5bit", "-o", tmp_path / "out.json"),
        "eval": ("eval", folder, "--text", text_file, "--plan", "channel-5bit"),
        "quantize": ("quantize", folder, "-o", tmp_path / "out"),
    }
    short.write_text("x")
    assert_refusal(cli(*arguments[command], "--calibration", short), "--calibration", "short.txt", "2 tokens")
    short.write_text("Too short for a window.")
    outcome = cli(*arguments[command], "--calibration", short)
    assert (outcome.status, outcome.said) == (0, [])
