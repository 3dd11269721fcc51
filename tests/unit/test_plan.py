"""Plans: round trips, hashes, presets, and errors that name what is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quicksilver import rules
from quicksilver.core.files import write_atomically
from quicksilver.errors import InputError, PlanError
from quicksilver.plan import PRESETS, Plan
from quicksilver.rules.fusion.base import FUSION_RULES
from quicksilver.rules.halting.base import HALTING_RULES
from quicksilver.rules.kv.base import FILL_RULES
from quicksilver.rules.precision.base import PRECISION_RULES
from tests.strategies import fusing_plans, plans, skipping_plans

BASE: dict[str, Any] = {"version": 2, "halting": {"rule": {"type": "drift", "threshold": 0.1}}, "kv": {"fill": "drop"}}


@given(st.one_of(plans, fusing_plans, skipping_plans))
def test_round_trip_through_json(plan: Plan) -> None:
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), tensors=plan.stored)
    assert again == plan
    assert again.hash == plan.hash


def test_the_hash_ignores_the_name_and_nothing_else() -> None:
    plan = Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)))
    assert plan.renamed("b").hash == plan.hash
    others = [
        Plan.dense(),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.2))),
        Plan("a", rules.HaltingConfig(rules.RelativeDriftRule(0.1))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1), min_layer=3)),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), rules.KVConfig(rules.ZeroFill())),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), fusion=rules.FusionConfig(rules.L2FusionRule(1.0))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), fusion=rules.FusionConfig(rules.CosineFusionRule(1.0))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), kv=rules.KVConfig(skip_below=0.1)),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), kv=rules.KVConfig(skip_below=(0.1, 0.1))),
        Plan(
            "a",
            rules.HaltingConfig(rules.DriftRule(0.1)),
            kv=rules.KVConfig(skip_below=0.1, estimate_dims_above=0.5),
        ),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), kv=rules.KVConfig(estimate_dims_above=0.5)),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 12


def test_presets_keep_their_hashes() -> None:
    """A default that changes, or a field that is new, must not change what plans are called by."""
    assert Plan.dense().hash == "0899eaeee76dcfdd"
    assert Plan.preset("settled").hash == "22c09f9a3e59e443"
    assert Plan.preset("fused-prompt").hash == "2279c45336468462"
    assert Plan.preset("channel-5bit").hash == "9dadfa6b9a33f0e5"


def test_the_paper_preset_is_the_published_rule() -> None:
    halting = Plan.preset("paper").halting
    assert halting is not None
    assert halting.rule == rules.AllRule((rules.DriftRule(0.045), rules.EntropyRule(1.15)))
    assert (halting.min_layer, halting.protect_first) == (1, 0)
    assert Plan.preset("paper").kv == rules.KVConfig()
    assert Plan.preset("paper-zero").kv == rules.KVConfig(rules.ZeroFill())


def test_presets_carry_their_own_names() -> None:
    assert all(plan.name == name for name, plan in PRESETS.items())
    assert PRESETS["dense"].is_dense


FUSION = {"rule": {"type": "cosine", "threshold": 0.9}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3 is not supported"),
        ({"version": None}, "version None"),
        ({"halts": {}}, "unknown key 'halts'"),
        ({"fusion": {"type": "cosine"}}, "fusion.rule is missing"),
        ({"fusion": {"rule": {"type": "cosine"}}}, "fusion.rule.threshold is missing"),
        ({"fusion": {"rule": {"type": "euclid"}}}, "fusion.rule.type must be one of cosine, forced, l2, random"),
        ({"fusion": {"rule": {"type": "l2", "threshold": "near"}}}, "threshold must be a number"),
        ({"fusion": {"rule": {"type": "l2", "threshold": [1, 2]}, "layers": [3]}}, "2 thresholds for 1 fusion layers"),
        ({"fusion": {**FUSION, "layers": []}}, "fusion.layers is empty"),
        ({"fusion": {**FUSION, "layers": [0]}}, "fusion.layers must be at least 1"),
        ({"fusion": {**FUSION, "max_group": 1}}, "fusion.max_group"),
        ({"fusion": {**FUSION, "max_group": 10**30}}, "fusion.max_group"),
        ({"fusion": {**FUSION, "protect_first": 2**63}}, "fusion.protect_first"),
        ({"fusion": {"rule": {"type": "cosine", "threshold": 1.5}}}, "must lie in .-1, 1., got 1.5"),
        ({"fusion": {"rule": {"type": "cosine", "threshold": [0.5, -2]}, "layers": [1, 2]}}, "got -2.0"),
        ({"fusion": {**FUSION, "weights": "best"}}, "fusion.weights must be one of last, mass, got"),
        ({"fusion": {**FUSION, "scope": "some"}}, "fusion.scope must be one of prompt, all"),
        ({"fusion": {**FUSION, "protect_first": 1.5}}, "fusion.protect_first"),
        ({"fusion": {**FUSION, "protect": 1}}, "fusion: unknown key 'protect'"),
        ({"fusion": {"rule": {"type": "random", "probability": 2}}}, "probability must lie in"),
        ({"fusion": {"rule": {"type": "forced", "joins": [1, 0]}}}, "joins must be a list of true and false"),
        ({"kv": 0.5}, "kv must be an object"),
        ({"kv": {"skip_below": "low"}}, "kv: skip_below must be a number"),
        ({"kv": {"skip_below": True}}, "skip_below must be a number"),
        ({"kv": {"skip_below": None}}, "skip_below must be a number"),
        ({"kv": {"skip_below": float("nan")}}, "skip_below must be a number"),
        ({"kv": {"skip_below": 1.01}}, "must lie in .0, 1., got 1.01"),
        ({"kv": {"skip_below": [0.5, -0.1]}}, "must lie in .0, 1., got -0.1"),
        ({"kv": {"estimate_dims_above": float("inf")}}, "kv: estimate_dims_above must be a number"),
        ({"kv": {"estimate_dims_above": -0.1}}, "kv: estimate_dims_above must be 0 or more, got -0.1"),
        ({"kv": {"estimate_dims_above": [1, 2]}}, "kv: estimate_dims_above must be one number for all layers"),
        ({"kv": {"heads": 2}}, "kv: unknown key 'heads'"),
        ({"kv": {"bits": 4}}, "kv: bits must be 8 or 16, got 4"),
        ({"kv": {"bits": 8.0}}, "kv: bits must be 8 or 16, got 8.0"),
        ({"kv": {"bits": True}}, "kv: bits must be 8 or 16, got True"),
        ({"name": 3}, "name must be a printable string"),
        ({"hash": "0123456789abcdef"}, "does not match"),
        ({"halting": []}, "halting must be an object"),
        ({"halting": {}}, "halting.rule is missing, and there are no shortcuts"),
        ({"halting": {"rule": {"type": "vibes"}}}, "halting.rule.type must be one of all, drift, entropy"),
        ({"halting": {"rule": {"type": "drift"}}}, "threshold"),
        ({"halting": {"rule": {"type": "drift", "threshold": "low"}}}, "threshold must be a number"),
        ({"halting": {"rule": {"type": "drift", "threshold": True}}}, "threshold must be a number"),
        ({"halting": {"rule": {"type": "drift", "threshold": float("nan")}}}, "threshold must be a number"),
        ({"halting": {"rule": {"type": "drift", "threshold": 1, "speed": 2}}}, "unknown key 'speed'"),
        ({"halting": {"rule": {"type": "all", "rules": []}}}, "at least one rule"),
        ({"halting": {"rule": {"type": "all", "rules": {}}}}, "must be a list of rules"),
        ({"halting": {"rule": {"type": "all", "rules": [{"type": "x"}]}}}, r"rules\[0\].type"),
        ({"halting": {"rule": {"type": "forced", "depths": [0]}}}, "depths must be whole numbers"),
        ({"halting": {"rule": {"type": "random", "probability": 1.5}}}, "probability must lie"),
        ({"halting": {"rule": {"type": "fixed_point", "threshold": 1, "min_cosine": 2}}}, "min_cosine must lie"),
        ({"halting": {"rule": {"type": "entropy", "threshold": 1, "layers": [-1]}}}, "layer indices"),
        ({"halting": {**BASE["halting"], "min_layer": 0}}, "min_layer must be"),
        ({"halting": {**BASE["halting"], "min_layer": 1.5}}, "min_layer must be"),
        ({"halting": {**BASE["halting"], "protect_first": -1}}, "protect_first"),
        ({"kv": {"fill": "forget"}}, "kv.fill.type must be one of drop, propagate, .*zero, got 'forget'"),
        ({"kv": {"fill": {"type": "drop", "deep": 1}}}, "kv.fill: unknown key 'deep'"),
        ({"kv": {"fill": 3}}, "kv.fill must be an object, got 3"),
        ({"kv": {"type": "drop"}}, "kv: unknown key 'type'"),
        ({"halting": {"shortcuts": {}}}, "halting.shortcuts must be a list"),
        ({"halting": {"shortcuts": []}}, "halting.rule is missing"),
        ({"halting": {**BASE["halting"], "shortcuts_protect_first": -1}}, "halting.shortcuts_protect_first must be"),
        ({"halting": {**BASE["halting"], "output_maps": 1}}, "halting.output_maps must be true or false, got 1"),
        ({"attention": {"threshold": 0.5}}, "unknown key 'attention'"),
        ({"kv": "drop"}, "kv must be an object"),
    ],
)
def test_malformed_plans_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict({**BASE, **change}, "mine.json")
    assert str(caught.value).startswith("mine.json")


NAMED_TWICE: list[tuple[dict[str, Any], str]] = [
    ({"kv": {"bits": 7}}, "mine.json: kv: bits must be 8 or 16, got 7"),
    ({"kv": {"skip_below": 2}}, "mine.json: kv: skip_below must lie in [0, 1], got 2.0"),
    ({"fusion": {**FUSION, "layers": []}}, "mine.json: fusion.layers is empty"),
    ({"halting": {"output_maps": 1}}, "mine.json: halting.output_maps must be true or false, got 1"),
    (
        {"halting": {"shortcuts": [{"layer": 1, "part": "norm"}]}},
        "mine.json: halting.shortcuts[0]: part must be one of mlp, attention, got 'norm'",
    ),
    ({"halting": {"shortcuts": [{"layer": 1}]}}, "mine.json: halting.shortcuts[0].part is missing"),
]


@pytest.mark.parametrize(("change", "message"), NAMED_TWICE, ids=lambda value: "".join(value)[:20])
def test_an_error_names_its_part_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({"version": 2, **change}, "mine.json")
    assert str(caught.value) == message


def test_a_plan_without_a_version_is_told_so() -> None:
    with pytest.raises(PlanError, match=r'mine.json: version is missing: a plan says "version": 2'):
        Plan.from_dict({"name": "mine"}, "mine.json")


def test_what_is_skipped_has_one_threshold_or_one_for_each_layer() -> None:
    plan = Plan.from_dict({"version": 2, "kv": {"skip_below": [0, 0.5, 1], "estimate_dims_above": 1}})
    assert plan.kv == rules.KVConfig(skip_below=(0.0, 0.5, 1.0))
    assert [rules.threshold_at(plan.kv.skip_below, i) for i in range(3)] == [0.0, 0.5, 1.0]
    assert plan.to_dict()["kv"] == {"fill": "drop", "skip_below": [0.0, 0.5, 1.0]}
    assert Plan.from_dict(plan.to_dict()) == plan
    assert not plan.is_dense
    assert "kv" not in Plan.dense().to_dict()
    plan.check_model(3, 0, 32)
    with pytest.raises(PlanError, match="plan 'plan': 3 thresholds, the model has 4 layers"):
        plan.check_model(4, 0, 32)
    Plan(kv=rules.KVConfig(skip_below=0.5)).check_model(4, 0, 32)


RETIRED = ("skip_values_below", "drop_query_dims_below", "screen_keys_below", "screen_query_dims_below")


@pytest.mark.parametrize("value", [0.2, 0, [0.1] * 4, {"array": "kv.it"}], ids=str)
@pytest.mark.parametrize("name", RETIRED)
def test_the_thresholds_that_there_were_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(PlanError, match=f"^mine.json: kv: key '{name}' is retired: use kv.skip_below, one threshold"):
        Plan.from_dict({"version": 2, "kv": {name: value, "skip_below": 0.1}}, "mine.json")


def test_entries_in_fewer_bits_are_a_mechanism_too() -> None:
    plans = [Plan.from_dict({"version": 2, "kv": {"bits": bits}}) for bits in (8, 16, None)]
    assert [plan.kv.bits for plan in plans] == [8, 16, None]
    assert plans[0].to_dict()["kv"] == {"fill": "drop", "bits": 8}
    assert [plan.is_dense for plan in plans] == [False, False, True]
    assert len({plan.hash for plan in plans}) == 3
    assert plans[2].hash == Plan.dense().hash


def test_shortcuts_and_output_maps_need_no_rule_and_may_have_their_own_protection() -> None:
    shortcut = {"layer": 1, "part": "mlp"}
    alone = Plan.from_dict({"version": 2, "halting": {"shortcuts": [shortcut], "protect_first": 2}})
    assert alone.halting is not None
    assert (alone.halting.rule, alone.halting.for_shortcuts.protect_first, alone.is_dense) == (None, 2, False)
    own = Plan.from_dict(
        {"version": 2, "halting": {**BASE["halting"], "shortcuts": [shortcut], "shortcuts_protect_first": 0}}
    )
    assert own.halting is not None
    assert (own.halting.protect_first, own.halting.for_shortcuts.protect_first) == (4, 0)
    same = Plan("x", rules.HaltingConfig(rules.DriftRule(0.1), shortcuts=own.shortcuts, shortcuts_protect_first=4))
    assert same.hash == Plan("x", rules.HaltingConfig(rules.DriftRule(0.1), shortcuts=own.shortcuts)).hash != own.hash
    maps = Plan.from_dict({"version": 2, "halting": {"output_maps": True}})
    assert maps.is_dense  # nobody stops, so nothing is mapped
    assert Plan.from_dict(maps.to_dict()) == maps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Plan(halting=rules.RelativeDriftRule(0.1)),
            "plan 'plan': halting must be a HaltingConfig, got RelativeDriftRule;"
            " it goes into a HaltingConfig: HaltingConfig(rule=...)",
        ),
        (lambda: Plan("mine", precision=rules.UniformBitsRule(4)), "plan 'mine': precision must be a PrecisionConfig"),
        (lambda: Plan(fusion=rules.CosineFusionRule(0.5)), "fusion must be a FusionConfig, got CosineFusionRule"),
        (lambda: Plan(fusion=rules.HaltingConfig(rules.DriftRule(1.0))), "halting holds a HaltingConfig"),
        (lambda: Plan(kv="drop"), "kv must be a KVConfig, got 'drop' (str)"),
        (lambda: Plan(kv=None), "kv must be a KVConfig, got None"),
        (
            lambda: Plan(kv=rules.DropFill()),
            "kv must be a KVConfig, got DropFill; it goes into a KVConfig: KVConfig(fill=",
        ),
        (lambda: Plan(kv=rules.KVConfig), "kv must be a KVConfig, got the class KVConfig; make one: KVConfig(...)"),
        (
            lambda: rules.KVConfig("drop"),
            "kv.fill must be a FillRule, got 'drop' (str); there are DropFill, PropagateF",
        ),
        (
            lambda: rules.KVConfig(rules.DropFill),
            "kv.fill must be a FillRule, got the class DropFill; make one: DropFill",
        ),
        (lambda: Plan(halting=(rules.Shortcut(1, "mlp"),)), "halting must be a HaltingConfig, got (Shortcut("),
        (lambda: Plan(tensors={}), "tensors must be a PlanTensors, got {} (dict)"),
        (lambda: Plan(fitted_to="gpt2"), "fitted_to must be a FittedTo, got 'gpt2'"),
        (
            lambda: Plan(rules.HaltingConfig(rules.DriftRule(1.0))),
            "a plan's name must be a string, got HaltingConfig(",
        ),
        (lambda: rules.HaltingConfig("x"), "halting.rule must be a HaltingRule, got 'x' (str); there are "),
        (lambda: rules.FusionConfig(rules.DriftRule(0.1)), "fusion.rule must be a FusionRule, got DriftRule"),
        (lambda: rules.PrecisionConfig(None), "precision.rule must be a PrecisionRule, got None"),
        (lambda: rules.AllRule(rules.DriftRule(0.1)), "AllRule: rules must be a tuple of HaltingRules, got DriftRule"),
        (lambda: rules.AllRule((rules.DriftRule(0.1), "x")), "AllRule: rules must hold a HaltingRule, got 'x'"),
        (
            lambda: rules.HaltingConfig(shortcuts=rules.Shortcut(1, "mlp")),
            "halting.shortcuts must be a tuple of Shortcuts",
        ),
        (lambda: rules.HaltingConfig(shortcuts=("x",)), "halting.shortcuts must hold a Shortcut, got 'x'"),
        (lambda: rules.EntropyRule(1.0, layers=3), "EntropyRule: layers must be non-negative layer indices, got 3"),
        (lambda: rules.ForcedRule(3), "ForcedRule: depths must be whole numbers of at least 1, got 3"),
        (lambda: rules.ForcedFusionRule(True), "ForcedFusionRule: joins must be a list of true and false, got True"),
        (lambda: rules.FixedPointRule(0.1, "x"), "FixedPointRule: min_cosine must lie in [-1, 1], got 'x'"),
    ],
)
def test_a_part_of_the_wrong_type_is_refused_where_it_is_given(build: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        build()


def test_parts_in_a_list_become_a_tuple() -> None:
    assert rules.AllRule([rules.DriftRule(0.1)]) == rules.AllRule((rules.DriftRule(0.1),))  # type: ignore[arg-type]
    shortcut = rules.Shortcut(1, "mlp")
    assert rules.HaltingConfig(shortcuts=[shortcut]) == rules.HaltingConfig(shortcuts=(shortcut,))  # type: ignore[arg-type]


def test_rules_nested_without_end_are_refused() -> None:
    rule: dict[str, Any] = {"type": "drift", "threshold": 1}
    for _ in range(50):
        rule = {"type": "all", "rules": [rule]}
    with pytest.raises(PlanError, match="nested"):
        Plan.from_dict({"version": 2, "halting": {"rule": rule}})


def test_files_round_trip_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.preset("paper").save(path)
    assert Plan.load(path) == Plan.preset("paper")
    for name, content in (("text.json", b"not json"), ("bytes.json", b"\xff\xfe"), ("deep.json", b"[" * 100_000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PlanError, match=name):
            Plan.load(tmp_path / name)
    with pytest.raises(PlanError, match="No such file"):
        Plan.load(tmp_path / "missing.json")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_atomically(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that leaves others nothing and the group reading."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_atomically(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    write_atomically(path, "newer")
    assert path.stat().st_mode & 0o777 == 0o604
    assert path.read_text() == "newer"


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    for content in ("first", "second"):  # without a target, and with one
        write_atomically(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link.json", "target.json"]


def test_what_is_no_regular_file_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    if Path("/dev/full").is_char_device():
        (tmp_path / "full").symlink_to("/dev/full")
        with pytest.raises(InputError, match="No space left"):
            write_atomically(tmp_path / "full", "x")
    with pytest.raises(InputError, match="directory"):
        write_atomically(tmp_path, "x")


def test_every_rule_and_fill_has_a_name_in_the_file_format() -> None:
    def leaves(cls: type) -> set[type]:
        return {cls} if not cls.__subclasses__() else set().union(*map(leaves, cls.__subclasses__()))

    def ours(classes: set[type]) -> set[type]:
        return {cls for cls in classes if cls.__module__.startswith("quicksilver.")}  # tests define some

    assert ours(set(HALTING_RULES.classes())) == ours(leaves(rules.HaltingRule))
    assert ours(set(FILL_RULES.classes())) == ours(leaves(rules.FillRule))
    assert ours(set(FUSION_RULES.classes())) == ours(leaves(rules.FusionRule))
    assert ours(set(PRECISION_RULES.classes())) == ours(leaves(rules.PrecisionRule))
