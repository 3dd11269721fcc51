"""What calibration fitted, beside a plan: round trips, digests, and damage that is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.plan import Plan
from quicksilver.plan.affine import AffineMap
from quicksilver.plan.presets import CALIBRATED, calibrated_plans
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import Shortcut
from tests import tiny
from tests.engines import decoder, run_whole, shortcut_plan

PLAN = shortcut_plan(Shortcut(1, "mlp", 0.5), Shortcut(2, "attention"))
Tensors = dict[str, Tensor]


def saved(folder: Path, plan: Plan = PLAN) -> Path:
    path = folder / "mine.json"
    plan.save(path)
    return path


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("rank", [None, 3])
def test_files_round_trip_and_run_alike(tmp_path: Path, rank: int | None) -> None:
    plan = shortcut_plan(Shortcut(1, "mlp", 0.5), Shortcut(2, "attention"), rank=rank)
    again = Plan.load(saved(tmp_path, plan))
    assert (again, again.hash) == (plan, plan.hash)
    assert again.tensors is not None
    assert plan.tensors is not None
    assert all(torch.equal(again.tensors[name], value) for name, value in plan.tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]
    runs = [run_whole(decoder(tiny.model("llama"), each), tiny.token_ids(9)).logits for each in (plan, again)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_files_of_another_dtype_are_the_same_plan_where_the_values_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"m.bias": torch.arange(6.0).reshape(2, 3), "none": torch.zeros(0, 4), "one": torch.tensor(0.5)}
    plan = replace(PLAN, tensors=PlanTensors(tensors))
    path = saved(tmp_path, plan)
    for kept in (torch.float32, dtype):
        save_file({name: value.to(kept) for name, value in tensors.items()}, tmp_path / "mine.safetensors")
        again = Plan.load(path).tensors
        assert again == plan.tensors
        assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_a_plan_and_its_tensors_can_move_together(tmp_path: Path) -> None:
    path, folder = saved(tmp_path), tmp_path / "elsewhere"
    folder.mkdir()
    for file in (path, tmp_path / "mine.safetensors"):
        file.rename(folder / file.name)
    assert Plan.load(folder / "mine.json") == PLAN


def test_the_hash_and_the_digest_follow_every_value_name_and_shape() -> None:
    tensors = dict(tiny.shortcut_tensors())
    name = "shortcut.1.mlp.weight"
    others: list[Tensors] = [
        {**tensors, name: tensors[name] + torch.eye(32) * 1e-6},
        {**tensors, name: tensors[name].T},
        {**tensors, name: tensors[name].reshape(16, 64)},
        {key.replace("shortcut.1.mlp.weight", "shortcut.1.mlp.other"): value for key, value in tensors.items()},
        {key: value for key, value in tensors.items() if key != name},
    ]
    plans = [PLAN, *(replace(PLAN, tensors=PlanTensors(each)) for each in others)]
    assert len({plan.hash for plan in plans}) == len({plan.tensors for plan in plans}) == 6
    assert PlanTensors(dict(reversed(tensors.items()))) == tiny.shortcut_tensors()
    assert Plan("other", PLAN.halting, tensors=PLAN.tensors).hash == PLAN.hash


def test_tensors_that_were_changed_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    other = {**tiny.shortcut_tensors(), "shortcut.1.mlp.bias": torch.zeros(32)}
    save_file(other, tmp_path / "mine.safetensors")
    with pytest.raises(PlanError, match=r"mine.json: the plan's tensors have digest \w+, it was made with \w+"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the plan's tensors: No such file"), (b"", "not a safetensors"), (b"x" * 99, "not a safetens")],
    ids=["missing", "empty", "rubbish"],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path, beside = saved(tmp_path), tmp_path / "mine.safetensors"
    beside.unlink()
    if content is not None:
        beside.write_bytes(content)
    with pytest.raises(PlanError, match=f"mine.safetensors: {message}"):
        Plan.load(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path, beside = saved(tmp_path), tmp_path / "mine.safetensors"
    beside.write_bytes(beside.read_bytes()[:-40])
    with pytest.raises(PlanError, match="not a safetensors file"):
        Plan.load(path)


@pytest.mark.parametrize(
    "file", ["../mine.safetensors", "/etc/passwd", "sub/mine.safetensors", "..", ".", "", "a\0b", 3]
)
def test_only_a_file_beside_the_plan_is_read(tmp_path: Path, file: object) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = saved(inner)
    (inner / "sub").mkdir()
    for place in (tmp_path, inner / "sub"):
        (place / "mine.safetensors").write_bytes((inner / "mine.safetensors").read_bytes())
    edited(path, lambda data: data["tensors"].update(file=file))
    with pytest.raises(PlanError, match=r"mine.json: tensors.file must be the name of a file beside the plan"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["tensors"].pop("digest"), "tensors.digest is missing"),
        (lambda data: data["tensors"].update(digest=5), "tensors.digest is missing"),
        (lambda data: data["tensors"].update(digest="0" * 16), "it was made with 0000"),
        (lambda data: data.update(tensors=[]), "tensors.file must be"),
        (lambda data: data["halting"].pop("protect_first"), "hash"),
        (lambda data: data["halting"]["shortcuts"][0].update(part="norm"), r"shortcuts\[0\]: .*mlp, attention"),
        (lambda data: data["halting"]["shortcuts"][0].update(threshold=0), r"shortcuts\[0\]: .*positive number"),
        (lambda data: data["halting"]["shortcuts"][0].update(layer=-1), r"shortcuts\[0\]: .*layer's index"),
        (lambda data: data["halting"]["shortcuts"][0].update(rank=2), r"shortcuts\[0\]: unknown key 'rank'"),
        (lambda data: data["halting"].update(shortcuts=[]), "there are no shortcuts"),
        (lambda data: data["halting"]["shortcuts"].append(data["halting"]["shortcuts"][0]), "each sublayer once"),
        (lambda data: data["halting"].update(shortcuts={}), "must be a list"),
    ],
)
def test_malformed_plans_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = edited(saved(tmp_path), change)
    with pytest.raises(PlanError, match=f"mine.json: .*{message}|mine.json: {message}"):
        Plan.load(path)


def test_tensors_and_what_declares_them_belong_together() -> None:
    declared = PLAN.to_dict()
    with pytest.raises(PlanError, match="tensors have digest None"):
        Plan.from_dict(declared)
    del declared["tensors"]
    with pytest.raises(PlanError, match="it was made with None"):
        Plan.from_dict(declared, tensors=PLAN.tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(PlanError, match="x holds NaN or infinite"):
        PlanTensors({"x": torch.tensor([1.0, value])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shortcut.1.mlp.weight": None}, "shortcut.1.mlp.down is missing"),
        ({"shortcut.1.mlp.bias": None}, "shortcut.1.mlp.bias is missing"),
        ({"shortcut.1.mlp.gate": None}, "shortcut.1.mlp.gate is missing"),
        ({"shortcut.1.mlp.weight": (32, 31)}, "the model needs 32 to 32"),
        ({"shortcut.1.mlp.weight": (32,)}, "the model needs 32 to 32"),
        ({"shortcut.1.mlp.bias": (33,)}, "the model needs 32 to 32|has shapes"),
        ({"shortcut.1.mlp.gate": (32,)}, r"shortcut.1.mlp.gate has shape \(32,\), the model needs \(34,\)"),
        ({"shortcut.1.mlp.gate": (34, 1)}, r"has shape \(34, 1\), the model needs \(34,\)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_the_model_are_refused(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    tensors: Tensors = dict(tiny.shortcut_tensors())
    for name, shape in change.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(PlanError, match=f"plan 'test': .*({message})"):
        decoder(tiny.model("llama"), replace(PLAN, tensors=PlanTensors(tensors)))


@pytest.mark.parametrize(
    "shapes",
    [
        {"down": (32, 3), "up": (4, 32)},
        {"down": (31, 3), "up": (3, 32)},
        {"down": (32, 3)},
        {"up": (3, 32)},
        {"down": (), "up": ()},
    ],
)
def test_low_rank_maps_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {f"m.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(PlanError, match=r"m has shapes|tensor m\.(up|down) is missing"):
        AffineMap.named({**tensors, "m.bias": torch.zeros(32)}, "m", 32)


def test_a_gate_is_needed_only_where_a_threshold_is_set() -> None:
    tensors = {name: value for name, value in tiny.shortcut_tensors().items() if not name.endswith("gate")}
    ungated = shortcut_plan(Shortcut(1, "mlp"), Shortcut(2, "attention"))
    decoder(tiny.model("llama"), replace(ungated, tensors=PlanTensors(tensors)))
    with pytest.raises(PlanError, match="gate is missing"):
        decoder(tiny.model("llama"), replace(PLAN, tensors=PlanTensors(tensors)))


def test_a_shortcut_past_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="a shortcut is for layer 4, the model has 4 layers"):
        decoder(tiny.model("llama"), shortcut_plan(Shortcut(4, "mlp")))
    with pytest.raises(PlanError, match=r"shortcut.1.mlp.down is missing"):
        decoder(tiny.model("llama"), replace(PLAN, tensors=None))


LIMITS = tuple(0.1 + i / 30.0 for i in range(12))  # no float32 holds these
SETS = tuple((limit, limit / 7.0) for limit in LIMITS)
LISTS = replace(
    PLAN,
    halting=replace(PLAN.halting, rule=rules.AllRule((rules.DriftRule(LIMITS), rules.EntropyRule(1.0)))),  # type: ignore[type-var]
    kv=rules.KVConfig(skip_below=LIMITS),
    precision=rules.PrecisionConfig(rules.ChannelBitsRule(SETS, (8, 4, 0))),
)


def test_long_lists_of_numbers_are_kept_exactly_beside_the_plan(tmp_path: Path) -> None:
    path = saved(tmp_path, LISTS)
    data, stored = json.loads(path.read_text()), load_file(tmp_path / "mine.safetensors")
    assert data["halting"]["rule"]["rules"][0]["threshold"] == {"array": "halting.rule.rules.0.threshold"}
    assert data["kv"]["skip_below"] == {"array": "kv.skip_below"}
    few = Plan("mine", kv=rules.KVConfig(skip_below=(0.1,) * 8))
    assert few.to_dict()["kv"]["skip_below"] == [0.1] * 8
    assert stored["precision.rule.thresholds"].dtype == torch.float64
    assert stored["precision.rule.thresholds"].shape == (12, 2)
    again = Plan.load(path)
    assert (again, again.hash, again.tensors) == (LISTS, LISTS.hash, PLAN.tensors)
    assert Plan.from_dict(json.loads(json.dumps(LISTS.to_dict())), tensors=LISTS.stored) == LISTS
    alone = replace(LISTS, tensors=None, halting=None)
    assert Plan.load(saved(tmp_path, alone)) == alone


def test_a_list_may_be_written_into_the_plan_whatever_its_length(tmp_path: Path) -> None:
    data = {"version": 2, "name": "mine", "kv": {"skip_below": list(LIMITS)}}
    plan = Plan.from_dict(data)
    assert plan == Plan("mine", kv=rules.KVConfig(skip_below=LIMITS))
    assert plan.hash == Plan.load(saved(tmp_path, plan)).hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda kv: kv["skip_below"].update(array="kv.other"),
            "kv.skip_below: the plan's tensors",
        ),
        (lambda kv: kv["skip_below"].update(array=3), "hold no array 3"),
        (lambda kv: kv["skip_below"].update(more=1), "skip_below must be a number"),
        (lambda kv: kv.update(bits={"array": "kv.skip_below"}), "bits must be 8 or 16"),
        (lambda kv: kv.pop("skip_below"), "the plan's tensors have digest"),
    ],
)
def test_arrays_that_are_not_there_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = edited(saved(tmp_path, LISTS), lambda data: change(data["kv"]))
    with pytest.raises(PlanError, match=f"mine.json: .*{message}"):
        Plan.load(path)


def test_an_array_that_was_changed_is_refused(tmp_path: Path) -> None:
    path, beside = saved(tmp_path, LISTS), tmp_path / "mine.safetensors"
    stored = load_file(beside)
    stored["kv.skip_below"][3] += 1e-15
    save_file(stored, beside)
    with pytest.raises(PlanError, match=r"mine.json: the plan's tensors have digest \w+, it was made with \w+"):
        Plan.load(path)


@pytest.mark.skipif("ref-llama/strong" not in calibrated_plans(), reason="this checkout holds no embedded model")
@pytest.mark.parametrize("name", ["ref-llama/mild", "ref-llama/strong", "ref-gpt2/mild", "ref-gpt2/strong"])
def test_calibrated_plans_fit_a_screen(name: str) -> None:
    path = CALIBRATED / f"{name}.json"
    assert len(path.read_text().splitlines()) <= 45
    assert path.read_text().count('"version": 2') == 1
    assert Plan.load(path).to_dict()["hash"] == json.loads(path.read_text())["hash"]
