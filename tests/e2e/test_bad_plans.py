"""Bad plans: exit status 2, one line that names the plan, or what its name stands for, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quicksilver.plan import Plan
from quicksilver.plan.presets import calibrated_plans
from quicksilver.rules.retired import RETIRED as RETIRED_NAMES
from tests.e2e.conftest import DEEP, LONG_NUMBER

Refused = Callable[..., str]
THRESHOLD = {"type": "drift", "threshold": 0.1}
COSINE = {"type": "cosine", "threshold": 0.5}

BAD_PLANS: dict[str, tuple[Any, str]] = {
    "not JSON": ("halting: all", "JSON"),
    "empty": ("", "JSON"),
    "not UTF-8": (b"\xff\xfe{}", "JSON"),
    "a list": ([], "object"),
    "no version": ({"version": None}, "version"),
    "wrong version": ({"version": 3}, "version 3"),
    "unknown key": ({"haltin": {}}, "haltin"),
    "unknown rule": ({"halting": {"rule": {"type": "vibes"}}}, "vibes"),
    "no rule": ({"halting": {"min_layer": 2}}, "rule"),
    "unknown key of a rule": ({"halting": {"rule": {**THRESHOLD, "speed": 1}}}, "speed"),
    "unknown fill": ({"kv": {"fill": "forget"}}, "forget"),
    "threshold NaN": ({"halting": {"rule": {**THRESHOLD, "threshold": float("nan")}}}, "threshold"),
    "threshold a string": ({"halting": {"rule": {**THRESHOLD, "threshold": "low"}}}, "low"),
    "threshold null": ({"halting": {"rule": {**THRESHOLD, "threshold": None}}}, "threshold"),
    "threshold missing": ({"halting": {"rule": {"type": "drift"}}}, "threshold"),
    "a threshold in a list": ({"halting": {"rule": {**THRESHOLD, "threshold": [0.1, "x", 0.1, 0.1]}}}, "threshold"),
    "fusion": ({"fusion": {"type": "cosine"}}, "fusion"),
    "precision": ({"precision": {"bits": [8, 4]}}, "precision"),
    "wrong hash": ({"halting": {"rule": THRESHOLD}, "hash": "0" * 16}, "hash"),
    "hash of another type": ({"hash": 7}, "hash"),
    "layers of another type": ({"halting": {"rule": {"type": "entropy", "threshold": 1, "layers": 3}}}, "layers"),
    "nested without end": (DEEP, "JSON"),
    "a name that no terminal prints": ({"name": "\ud800"}, "printable"),
    "thresholds in thresholds": (
        {"version": 1, "attention": {"threshold": json.loads("[" * 500 + "]" * 500)}},
        "kv.skip_below",
    ),
    "printed without its numbers": ({"tensors": {"file": None, "digest": "0"}}, "printed without the numbers"),
    "an endless number": (f'{{"version": {LONG_NUMBER}}}', "bad.json"),
    "threshold beyond floats": ({"halting": {"rule": {**THRESHOLD, "threshold": 10**400}}}, "threshold"),
    "seed a string": ({"halting": {"rule": {"type": "random", "probability": 0.5, "seed": "x"}}}, "seed"),
    "seed a fraction": ({"halting": {"rule": {"type": "random", "probability": 0.5, "seed": 0.5}}}, "seed"),
    "protect_special a string": ({"halting": {"rule": THRESHOLD, "protect_special": "no"}}, "protect_special"),
    "a depth beyond integers": ({"halting": {"rule": {"type": "forced", "depths": [10**30]}}}, "depths"),
}


SKIPPING = ("skip_values_below", "drop_query_dims_below", "screen_keys_below", "screen_query_dims_below")
CHANNEL = {"type": "channel", "target": 5.0}
ENTROPY = {"type": "entropy", "target": [0.5, 0.3, 0.2]}
RETIRED: dict[str, tuple[dict[str, Any], str]] = {
    "share": ({"kv": {"type": "share"}}, "use 'drop' or 'propagate'"),
    "any": ({"halting": {"rule": {"type": "any", "rules": [THRESHOLD]}}}, "use 'all'"),
    "any in all": (
        {"halting": {"rule": {"type": "all", "rules": [THRESHOLD, {"type": "any", "rules": [THRESHOLD]}]}}},
        "rules[1]: halting rule 'any' is retired: use 'all'",
    ),
    "key": ({"fusion": {"rule": {"type": "key", "threshold": 0.5}}}, "use 'cosine'"),
    "uniform": ({"fusion": {"rule": COSINE, "weights": "uniform"}}, "use 'mass'"),
    "kv": ({"fusion": {"rule": COSINE, "weights": "kv"}}, "use 'last' or 'mass'"),
    "capped": ({"precision": {"rule": {"type": "capped", "token": ENTROPY, "channel": CHANNEL}}}, "use 'channel'"),
    "activation": ({"precision": {"rule": {**CHANNEL, "score": "activation"}}}, "leave score out"),
    "True": ({"halting": {"rule": THRESHOLD}, "maps": {"entropy": True}}, "entropy True is retired: leave it out"),
    **{key: ({"version": 2, "kv": {key: 0.1}}, "use kv.skip_below") for key in SKIPPING},
    "attention.threshold": ({"attention": {"threshold": 0.1}}, "use kv.skip_below"),
    "attention.query_threshold": ({"attention": {"query_threshold": 0.1}}, "use kv.skip_below"),
    "screening.threshold": ({"screening": {"threshold": 0.1}}, "use kv.skip_below"),
    **{f"{n}": ({"precision": {"rule": {"type": "uniform", "bits": n}}}, f"use {n + 1}") for n in (1, 3, 5, 7)},
    "5 of several": ({"precision": {"rule": {**CHANNEL, "bits": [8, 5, 0]}}}, "bits 5 is retired: use 6"),
    "3 of several": ({"precision": {"rule": {**ENTROPY, "bits": [8, 4, 3]}}}, "bits 3 is retired: use 4"),
}
"""What plans could once name: by that name, a plan and what is said of it."""


@pytest.mark.parametrize("name", RETIRED)
def test_what_is_retired_is_named_with_what_to_use_instead(refused: Refused, tmp_path: Path, name: str) -> None:
    (content, instead), path = RETIRED[name], tmp_path / "old.json"
    path.write_text(json.dumps({"version": 1, **content}))
    line = refused("plan", "validate", path, names=(path, "is retired", name.split()[0], instead))
    assert line.count("is retired") == 1


def test_every_retired_name_is_tested() -> None:
    tested = {name for name in RETIRED if " " not in name}
    assert tested == {str(value) for values in RETIRED_NAMES.values() for value in values}


@pytest.mark.parametrize(
    "part", [{"precision": {"rule": {**CHANNEL, "score": "weighted"}}}, {"maps": {"entropy": False}}]
)
def test_the_value_that_is_left_may_still_be_written(tmp_path: Path, part: dict[str, Any]) -> None:
    ((key, config),) = part.items()
    without = {**config, "rule": CHANNEL} if "rule" in config else {}
    plans = [Plan.from_dict({"version": 1, key: each}) for each in (config, without)]
    assert plans[0] == plans[1]
    assert plans[0].hash == plans[1].hash


@pytest.mark.parametrize(("content", "named"), BAD_PLANS.values(), ids=list(BAD_PLANS))
def test_plan_files(refused: Refused, tmp_path: Path, content: Any, named: str) -> None:
    path = tmp_path / "bad.json"
    if isinstance(content, dict):
        content = json.dumps({"version": 2, **content})
    elif isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("plan", "validate", path, names=(path, named))
    refused("plan", "show", path, names=(path, named))


def test_a_bad_plan_is_found_before_the_model_is_read(refused: Refused, tmp_path: Path, text_file: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    refused("eval", tmp_path / "no-model", "--text", text_file, "--plan", "paper", "--plan", bad, names=(bad,))
    refused("generate", tmp_path / "no-model", "Once", "--plan", bad, names=(bad,))


def test_an_unknown_preset(refused: Refused, folder: Path, text_file: Path) -> None:
    for arguments in (("plan", "show", "papper"), ("plan", "validate", "papper")):
        refused(*arguments, names=("papper", "paper"))
    refused("eval", folder, "--text", text_file, "--plan", "papper", names=("papper", "paper"))
    refused("generate", folder, "Once", "--plan", "papper", names=("papper", "paper"))


def test_a_plan_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    line = refused("plan", "validate", tmp_path / "missing.json", names=("missing.json: there is no such file",))
    assert "preset" not in line
    (tmp_path / "folder.json").mkdir()
    refused("plan", "validate", tmp_path / "folder.json", names=("folder.json: is not a plan file",))


def test_a_plan_given_as_json_instead_of_a_file(refused: Refused) -> None:
    inline = json.dumps({"version": 2, "halting": {"rule": {**THRESHOLD, "threshold": [0.1] * 99}}})
    refused("plan", "validate", inline, names=("plan file",))


@pytest.mark.parametrize("count", [0, 3, 5])
def test_thresholds_that_do_not_fit_the_models_depth(
    refused: Refused, folder: Path, text_file: Path, plan_file: Callable[..., Path], count: int
) -> None:
    plan = plan_file(halting={"rule": {"type": "relative", "threshold": [0.1] * count}})
    names = ("mine", f"{count} thresholds", "4 layers")
    refused("eval", folder, "--text", text_file, "--context", 32, "--plan", plan, names=names)
    refused("generate", folder, "Once", "--plan", plan, names=names)


@pytest.mark.skipif("ref-gpt2/strong" not in calibrated_plans(), reason="this checkout holds no embedded model")
def test_a_preset_of_another_model_is_named_with_it(refused: Refused, folder: Path, text_file: Path) -> None:
    names = ("'ref-gpt2/strong'", "the model has 4 layers", "fitted to ref-gpt2")
    refused("eval", folder, "--text", text_file, "--context", 32, "--plan", "ref-gpt2/strong", names=names)
    refused("generate", folder, "Once", "--plan", "ref-gpt2/strong", names=names)


@pytest.mark.parametrize("model", ["./no-folder", "no-such-model"])
def test_a_misspelt_model_is_not_said_to_be_the_plans_fault(refused: Refused, text_file: Path, model: str) -> None:
    refused("eval", model, "--text", text_file, "--plan", "strong", names=(model, "model"))


def test_a_changed_plan_says_how_it_is_taken(refused: Refused, plan_file: Callable[..., Path]) -> None:
    path = plan_file(hash="0123456789abcdef")
    refused("plan", "validate", path, names=(path, "0123456789abcdef", 'take "hash" out'))
