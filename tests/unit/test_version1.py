"""Plans of version 1: each reads as the plan of version 2 that does the same, and what is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.plan import PRESETS, Plan
from quicksilver.plan.presets import CALIBRATED, calibrated_plans
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
    "attention": (
        {"attention": {"threshold": [0.1] * 12, "query_threshold": 0.2}},
        Plan("x", kv=rules.KVConfig(skip_values_below=(0.1,) * 12, drop_query_dims_below=0.2)),
    ),
    "screening": (
        {"screening": {"threshold": 0.1, "query_threshold": 2.0}},
        Plan("x", kv=rules.KVConfig(screen_keys_below=0.1, screen_query_dims_below=2.0)),
    ),
    "screening by default": ({"screening": {"threshold": 0.1}}, Plan("x", kv=rules.KVConfig(screen_keys_below=0.1))),
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


@pytest.mark.skipif("ref-gpt2/mild" not in calibrated_plans(), reason="this checkout holds no embedded model")
def test_a_calibrated_plan_as_it_was_written() -> None:
    old, new = Plan.load(OLD / "ref-gpt2-mild.json"), Plan.load(CALIBRATED / "ref-gpt2" / "mild.json")
    assert (old, old.hash) == (new, new.hash)


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
        ({"attention": {"threshold": 2}}, "skip_values_below must lie in .0, 1., got 2.0"),
        ({"screening": {}}, "screening.threshold is missing"),
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
