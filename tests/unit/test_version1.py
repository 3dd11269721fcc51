"""Plans of version 1: each reads as the plan of version 2 that does the same, and what is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.plan import PRESETS, Plan
from tests import tiny

OLD = Path(__file__).parent.parent / "data" / "plans_version1"
DRIFT = {"rule": {"type": "drift", "threshold": 0.1}, "min_layer": 2, "protect_first": 4, "protect_special": True}
DRIFTING = rules.DriftRule(0.1)
SHORTCUTS = {"shortcuts": [{"layer": 1, "part": "mlp", "threshold": 0.5}], "protect_first": 0, "protect_special": False}
SHORTCUT = (rules.Shortcut(1, "mlp", 0.5),)
CHANNEL = {"type": "channel", "thresholds": [[3.0, 1.0]] * 12, "widths": [8, 4, 0], "target": None}
CASES: dict[str, tuple[dict[str, Any], Plan]] = {
    "dense": ({"halting": None, "kv": {"type": "drop"}}, Plan.dense()),
    "halting": (
        {"halting": DRIFT, "kv": {"type": "propagate"}},
        Plan("x", rules.HaltingConfig(DRIFTING), rules.KVConfig(rules.PropagateFill())),
    ),
    "output maps": (
        {"halting": DRIFT, "maps": {"output": True, "entropy": False}},
        Plan("x", rules.HaltingConfig(DRIFTING, output_maps=True)),
    ),
    "maps by default": ({"maps": {}}, Plan("x", rules.HaltingConfig(output_maps=True))),
    "no output maps": ({"maps": {"output": False}}, Plan.dense()),
    "shortcuts": ({"shortcuts": SHORTCUTS}, Plan("x", rules.HaltingConfig(None, 2, 0, False, shortcuts=SHORTCUT))),
    "shortcuts and halting": (
        {"halting": DRIFT, "shortcuts": SHORTCUTS},
        Plan("x", rules.HaltingConfig(DRIFTING, 2, 4, True, False, SHORTCUT, 0, False)),
    ),
    "shortcuts and halting protect alike": (
        {"halting": DRIFT, "shortcuts": {"shortcuts": SHORTCUTS["shortcuts"]}},
        Plan("x", rules.HaltingConfig(DRIFTING, shortcuts=SHORTCUT)),
    ),
    "attention, off": ({"attention": {"threshold": 0, "query_threshold": [0.0] * 12}}, Plan.dense()),
    "screening, off": ({"screening": {"threshold": [0.0] * 12, "query_threshold": 1.0}}, Plan.dense()),
    "entries": ({"entries": {}, "kv": {"type": "zero"}}, Plan("x", kv=rules.KVConfig(rules.ZeroFill(), 8))),
    "entries of 16 bits": ({"entries": {"bits": 16}}, Plan("x", kv=rules.KVConfig(bits=16))),
    "uniform": (
        {"precision": {"rule": {"type": "uniform", "width": 4}, "protect_first": 0}},
        Plan("x", precision=rules.PrecisionConfig(rules.UniformBitsRule(4), protect_first=0)),
    ),
    "channels": (
        {"precision": {"rule": {**CHANNEL, "score": "weighted"}}},
        Plan("x", precision=rules.PrecisionConfig(rules.ChannelBitsRule(((3.0, 1.0),) * 12, (8, 4, 0)))),
    ),
    "tokens": (
        {"precision": {"rule": {"type": "entropy", "widths": [8, 2], "thresholds": [1.5]}}},
        Plan("x", precision=rules.PrecisionConfig(rules.EntropyBitsRule((1.5,), (8, 2)))),
    ),
}


@pytest.mark.parametrize(("old", "new"), CASES.values(), ids=list(CASES))
def test_it_reads_as_the_plan_of_version_2(old: dict[str, Any], new: Plan, tmp_path: Path) -> None:
    plan = Plan.from_dict({"version": 1, "hash": "0123456789abcdef", **old})
    assert plan == new.renamed("plan")
    assert plan.hash == new.hash
    plan.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["version"] == 2
    again = Plan.load(tmp_path / "new.json")
    assert (again, again.hash) == (plan, new.hash)


@pytest.mark.parametrize("name", ["dense", "paper-zero", "settled", "fused-prompt", "uniform-4bit", "channel-5bit"])
def test_presets_as_they_were_written(name: str) -> None:
    assert Plan.load(OLD / f"{name}.json") == PRESETS[name]


def test_a_calibrated_plan_as_it_was_written() -> None:
    """It skips by thresholds that are gone; without them it is read, so that it can be given the one that there is."""
    with pytest.raises(
        PlanError, match=r"ref-gpt2-mild\.json: key 'attention\.threshold' is retired: use kv\.skip_below"
    ):
        Plan.load(OLD / "ref-gpt2-mild.json")
    data = json.loads((OLD / "ref-gpt2-mild.json").read_text())
    plan = Plan.from_dict(data | {"attention": None, "screening": None, "tensors": None})
    assert plan.kv == rules.KVConfig(plan.kv.fill, bits=8)
    assert plan.precision is not None


def test_its_tensors_are_read_and_their_digest_is_checked(tmp_path: Path) -> None:
    tensors = tiny.shortcut_tensors()
    tensors.save(tmp_path / "old.safetensors")
    old = {"version": 1, "shortcuts": SHORTCUTS, "tensors": {"file": "old.safetensors", "digest": tensors.digest}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    new = Plan("plan", rules.HaltingConfig(None, 2, 0, False, shortcuts=SHORTCUT), tensors=tensors)
    assert Plan.load(tmp_path / "old.json") == new
    (tmp_path / "old.json").write_text(json.dumps({**old, "tensors": {"file": "old.safetensors", "digest": "0" * 16}}))
    with pytest.raises(PlanError, match="it was made with 0000"):
        Plan.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kv": "drop"}, "kv must be an object, got 'drop'"),
        ({"halting": []}, "halting must be an object"),
        ({"halting": {}}, "halting.rule is missing"),
        ({"haltin": {}}, "unknown key 'haltin'"),
        ({"kv": {"type": "forget"}}, "kv.fill.type must be one of drop, propagate, .*zero, got 'forget'"),
        ({"maps": {"output": 1}}, "halting.output_maps must be true or false, got 1"),
        ({"maps": {"entropi": True}}, "maps: unknown key 'entropi'"),
        ({"maps": {"entropy": 0}}, "maps: entropy must be left out, got 0"),
        ({"shortcuts": {"shortcuts": []}}, "shortcuts must name at least one sublayer"),
        ({"attention": 0.5}, "attention must be an object"),
        ({"attention": {"heads": 1}}, "attention: unknown key 'heads'"),
        ({"attention": {"threshold": 0.1}}, "key 'attention.threshold' is retired: use kv.skip_below"),
        ({"attention": {"query_threshold": [0, 0.1]}}, "key 'attention.query_threshold' is retired"),
        ({"screening": {"threshold": 0.1, "query_threshold": 2.0}}, "key 'screening.threshold' is retired"),
        ({"screening": {"threshold": "low"}}, "key 'screening.threshold' is retired"),
        ({"entries": {"bits": None}}, "entries: bits must be 8 or 16, got None"),
        ({"entries": {"bits": 4}}, "kv: bits must be 8 or 16, got 4"),
        ({"precision": {"rule": {**CHANNEL, "score": "loudness"}}}, "score must be left out, got 'loudness'"),
        ({"precision": {"rule": {"type": "uniform", "width": 9}}}, "bits must be one of 2, 4, 6, 8, got 9"),
        ({"precision": 3}, "precision must be an object"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^mine.json: .*{message}"):
        Plan.from_dict({"version": 1, **content}, "mine.json")
