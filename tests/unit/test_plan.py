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
from quicksilver.plan import PRESETS, Plan, codec
from quicksilver.rules.fusion import FUSION_RULES
from quicksilver.rules.halting import HALTING_RULES
from tests.strategies import fusing_plans, plans, skipping_plans

BASE: dict[str, Any] = {"version": 1, "halting": {"rule": {"type": "drift", "threshold": 0.1}}, "kv": {"type": "drop"}}


@given(st.one_of(plans, fusing_plans, skipping_plans))
def test_round_trip_through_json(plan: Plan) -> None:
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), tensors=plan.tensors)
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
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), rules.ZeroFill()),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), fusion=rules.FusionConfig(rules.L2FusionRule(1.0))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), fusion=rules.FusionConfig(rules.CosineFusionRule(1.0))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), attention=rules.AttentionConfig(0.1)),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), attention=rules.AttentionConfig((0.1, 0.1))),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), attention=rules.AttentionConfig(0.1, 0.1)),
        Plan("a", rules.HaltingConfig(rules.DriftRule(0.1)), attention=rules.AttentionConfig(0.0, 0.1)),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 12


def test_a_plan_without_fusion_keeps_the_hash_it_had_before_there_was_fusion() -> None:
    assert Plan.dense().hash == "2a30209e3c3c1ac2"
    assert Plan.preset("settled").hash == "2de2b915cb8a596e"


def test_the_paper_preset_is_the_published_rule() -> None:
    halting = Plan.preset("paper").halting
    assert halting is not None
    assert halting.rule == rules.AllRule((rules.DriftRule(0.045), rules.EntropyRule(1.15)))
    assert (halting.min_layer, halting.protect_first) == (1, 0)
    assert Plan.preset("paper").kv == rules.DropFill()
    assert Plan.preset("paper-zero").kv == rules.ZeroFill()


def test_presets_carry_their_own_names() -> None:
    assert all(plan.name == name for name, plan in PRESETS.items())
    assert PRESETS["dense"].is_dense


FUSION = {"rule": {"type": "cosine", "threshold": 0.9}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not supported"),
        ({"version": None}, "version None"),
        ({"halts": {}}, "unknown key 'halts'"),
        ({"fusion": {"type": "cosine"}}, "fusion.rule is missing"),
        ({"fusion": {"rule": {"type": "cosine"}}}, "fusion.rule: .*threshold"),
        ({"fusion": {"rule": {"type": "euclid"}}}, "fusion.rule.type must be one of l2, cosine, random"),
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
        ({"attention": 0.5}, "attention must be an object"),
        ({"attention": {"threshold": "low"}}, "threshold must be a number"),
        ({"attention": {"threshold": True}}, "threshold must be a number"),
        ({"attention": {"threshold": float("nan")}}, "threshold must be a number"),
        ({"attention": {"threshold": 1.01}}, "must lie in .0, 1., got 1.01"),
        ({"attention": {"threshold": [0.5, -0.1]}}, "must lie in .0, 1., got -0.1"),
        ({"attention": {"query_threshold": "low"}}, "attention: query_threshold must be a number"),
        ({"attention": {"query_threshold": None}}, "attention: query_threshold must be a number"),
        ({"attention": {"query_threshold": float("inf")}}, "attention: query_threshold must be a number"),
        ({"attention": {"query_threshold": [2, -0.1]}}, "query_threshold must be 0 or more, got -0.1"),
        ({"attention": {"threshold": 0.5, "heads": 2}}, "attention: unknown key 'heads'"),
        ({"screening": 0.5}, "screening must be an object"),
        ({"screening": {}}, "screening: .*threshold"),
        ({"screening": {"threshold": -0.1}}, "screening: threshold must be 0 or more, got -0.1"),
        ({"screening": {"threshold": 1, "query_threshold": "low"}}, "screening: query_threshold must be a number"),
        ({"screening": {"threshold": 1, "query_threshold": [1, -2]}}, "query_threshold must be 0 or more, got -2.0"),
        ({"screening": {"threshold": 1, "keys": 2}}, "screening: unknown key 'keys'"),
        ({"entries": 8}, "entries must be an object"),
        ({"entries": {"bits": 4}}, "entries: bits must be 8 or 16, got 4"),
        ({"entries": {"bits": 8.0}}, "entries: bits must be 8 or 16, got 8.0"),
        ({"entries": {"bits": True}}, "entries: bits must be 8 or 16, got True"),
        ({"entries": {"bits": None}}, "entries: bits must be 8 or 16, got None"),
        ({"entries": {"bits": 8, "scale": 1}}, "entries: unknown key 'scale'"),
        ({"name": 3}, "name must be a string"),
        ({"hash": "0123456789abcdef"}, "does not match"),
        ({"halting": []}, "halting must be an object"),
        ({"halting": {}}, "halting.rule is missing"),
        ({"halting": {"rule": {"type": "vibes"}}}, "halting.rule.type must be one of drift, relative"),
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
        ({"kv": {"type": "forget"}}, "kv.type must be one of drop, zero, propagate, got 'forget'"),
        ({"kv": "drop"}, "kv must be an object"),
    ],
)
def test_malformed_plans_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict({**BASE, **change}, "mine.json")
    assert str(caught.value).startswith("mine.json")


NAMED_TWICE: list[tuple[dict[str, Any], str]] = [
    ({"entries": {"bits": 7}}, "mine.json: entries: bits must be 8 or 16, got 7"),
    ({"attention": {"threshold": 2}}, "mine.json: attention: threshold must lie in [0, 1], got 2.0"),
    ({"screening": {"threshold": -1}}, "mine.json: screening: threshold must be 0 or more, got -1.0"),
    ({"fusion": {**FUSION, "layers": []}}, "mine.json: fusion.layers is empty"),
    ({"maps": {"output": 1}}, "mine.json: maps.output must be true or false, got 1"),
    (
        {"shortcuts": {"shortcuts": [{"layer": 1, "part": "norm"}]}},
        "mine.json: shortcuts[0]: part must be one of mlp, attention, got 'norm'",
    ),
    ({"shortcuts": {"shortcuts": []}}, "mine.json: shortcuts must name at least one sublayer, and each one once"),
]


@pytest.mark.parametrize(("change", "message"), NAMED_TWICE, ids=lambda value: "".join(value)[:20])
def test_an_error_names_its_part_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({"version": 1, **change}, "mine.json")
    assert str(caught.value) == message


def test_a_plan_without_a_version_is_told_so() -> None:
    with pytest.raises(PlanError, match=r'mine.json: version is missing: a plan says "version": 1'):
        Plan.from_dict({"name": "mine"}, "mine.json")


def test_skipping_values_is_a_mechanism_with_one_threshold_or_one_for_each_layer() -> None:
    data = {"version": 1, "attention": {"threshold": [0, 0.5, 1]}}
    plan = Plan.from_dict(data)
    assert plan.attention == rules.AttentionConfig((0.0, 0.5, 1.0))
    assert [plan.attention.threshold_in(i) for i in range(3)] == [0.0, 0.5, 1.0]
    assert plan.to_dict()["attention"] == {"threshold": [0.0, 0.5, 1.0], "query_threshold": 0.0}
    assert not plan.is_dense
    assert "attention" not in Plan.dense().to_dict()
    plan.check_model(3, 0, 32)
    with pytest.raises(PlanError, match="plan 'plan': 3 thresholds, the model has 4 layers"):
        plan.check_model(4, 0, 32)
    Plan(attention=rules.AttentionConfig(0.5)).check_model(4, 0, 32)


def test_so_is_leaving_out_components_of_queries() -> None:
    plan = Plan.from_dict({"version": 1, "attention": {"query_threshold": [0, 0.5, 7]}})
    assert plan.attention == rules.AttentionConfig(0.0, (0.0, 0.5, 7.0))
    assert [plan.attention.query_threshold_in(i) for i in range(3)] == [0.0, 0.5, 7.0]
    assert plan.to_dict()["attention"] == {"threshold": 0.0, "query_threshold": [0.0, 0.5, 7.0]}
    plan.check_model(3, 0, 32)
    with pytest.raises(PlanError, match="plan 'plan': 3 thresholds, the model has 4 layers"):
        plan.check_model(4, 0, 32)
    assert rules.AttentionConfig() == rules.AttentionConfig(0.0, 0.0)


def test_screening_is_a_mechanism_with_two_thresholds() -> None:
    plan = Plan.from_dict({"version": 1, "screening": {"threshold": [0, 0.5, 7]}})
    assert plan.screening == rules.ScreeningConfig((0.0, 0.5, 7.0), 1.0)
    assert plan.to_dict()["screening"] == {"threshold": [0.0, 0.5, 7.0], "query_threshold": 1.0}
    assert Plan.from_dict(plan.to_dict()) == plan
    assert not plan.is_dense
    assert "screening" not in Plan.dense().to_dict()
    with pytest.raises(PlanError, match="plan 'plan': 3 thresholds, the model has 4 layers"):
        plan.check_model(4, 0, 32)


def test_entries_in_fewer_bits_are_a_mechanism_too() -> None:
    plan = Plan.from_dict({"version": 1, "entries": {}})
    assert plan.entries == rules.EntryConfig(8)
    assert plan.to_dict()["entries"] == {"bits": 8}
    assert Plan.from_dict(plan.to_dict()) == plan
    assert not plan.is_dense
    assert plan.hash != Plan.dense().hash
    assert "entries" not in Plan.dense().to_dict()
    halves = Plan.from_dict({"version": 1, "entries": {"bits": 16}})
    assert (halves.entry_bits, plan.entry_bits, Plan.dense().entry_bits) == (16, 8, None)
    assert halves.hash != plan.hash
    plan.check_model(4, 0, 32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Plan(halting=rules.RelativeDriftRule(0.1)),
            "plan 'plan': halting must be a HaltingConfig, got RelativeDriftRule; HaltingConfig(rule) holds a rule",
        ),
        (lambda: Plan("mine", precision=rules.UniformWidthRule(4)), "plan 'mine': precision must be a PrecisionConfig"),
        (lambda: Plan(fusion=rules.CosineFusionRule(0.5)), "fusion must be a FusionConfig, got CosineFusionRule"),
        (lambda: Plan(fusion=rules.HaltingConfig(rules.DriftRule(1.0))), "halting holds a HaltingConfig"),
        (lambda: Plan(kv="drop"), "kv must be a KVFill, got 'drop' (str); there are DropFill, ZeroFill, PropagateFill"),
        (lambda: Plan(kv=None), "kv must be a KVFill, got None"),
        (lambda: Plan(kv=rules.DropFill), "kv must be a KVFill, got the class DropFill; make one: DropFill(...)"),
        (lambda: Plan(maps=True), "maps must be a MapConfig, got True (bool)"),
        (lambda: Plan(shortcuts=(rules.Shortcut(1, "mlp"),)), "shortcuts must be a ShortcutConfig, got (Shortcut("),
        (lambda: Plan(attention=0.1), "attention must be an AttentionConfig, got 0.1"),
        (lambda: Plan(screening=0.1), "screening must be a ScreeningConfig, got 0.1"),
        (lambda: Plan(entries=8), "entries must be an EntryConfig, got 8"),
        (lambda: Plan(tensors={}), "tensors must be a PlanTensors, got {} (dict)"),
        (lambda: Plan(fitted_to="gpt2"), "fitted_to must be a FittedTo, got 'gpt2'"),
        (lambda: Plan(rules.HaltingConfig(rules.DriftRule(1.0))), "a plan's name must be a string, got HaltingConfig("),
        (lambda: rules.HaltingConfig("x"), "halting.rule must be a HaltingRule, got 'x' (str); there are DriftRule"),
        (lambda: rules.FusionConfig(rules.DriftRule(0.1)), "fusion.rule must be a FusionRule, got DriftRule"),
        (lambda: rules.PrecisionConfig(None), "precision.rule must be a PrecisionRule, got None"),
        (lambda: rules.AllRule(rules.DriftRule(0.1)), "AllRule: rules must be a tuple of HaltingRules, got DriftRule"),
        (lambda: rules.AllRule((rules.DriftRule(0.1), "x")), "AllRule: rules must hold a HaltingRule, got 'x'"),
        (lambda: rules.ShortcutConfig(rules.Shortcut(1, "mlp")), "shortcuts.shortcuts must be a tuple of Shortcuts"),
        (lambda: rules.ShortcutConfig(("x",)), "shortcuts.shortcuts must hold a Shortcut, got 'x'"),
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
    assert rules.ShortcutConfig([shortcut]) == rules.ShortcutConfig((shortcut,))  # type: ignore[arg-type]


def test_rules_nested_without_end_are_refused() -> None:
    rule: dict[str, Any] = {"type": "drift", "threshold": 1}
    for _ in range(50):
        rule = {"type": "all", "rules": [rule]}
    with pytest.raises(PlanError, match="nested"):
        codec.decode_rule(rule, "deep")


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
    assert set(codec.FILL_TYPES.values()) == leaves(rules.KVFill)
    assert ours(set(FUSION_RULES.classes())) == ours(leaves(rules.FusionRule))
