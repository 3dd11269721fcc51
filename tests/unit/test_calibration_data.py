"""What is fitted on a model: maps that stand in for layers and sublayers, gates that know where they err, one file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quicksilver.calibrate import data_file
from quicksilver.calibrate.candidates import CalibrationData
from quicksilver.calibrate.fitting import fit, steps
from quicksilver.calibrate.objectives import UnitCosts
from quicksilver.calibrate.observe import PROTECTED, SublayerRows, layer_states, watch_sublayers
from quicksilver.calibrate.outputs import divergence, fit_gates, fit_maps
from quicksilver.calibrate.shortcuts import fit_in_order, fit_units, units
from quicksilver.core.signals import gate_features, shortcut_error
from quicksilver.errors import ModelError
from quicksilver.families.registry import adapt
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.plan.affine import AffineMap
from quicksilver.rules import Shortcut
from tests import tiny, tolerances

WINDOWS = [tiny.token_ids(60, seed=seed) for seed in range(16)]
UNSEEN = [tiny.token_ids(60, seed=seed) for seed in range(100, 104)]
LAYERS = (1, 2)
UNITS = UnitCosts(1e-6, 0.0, 1e-6, 1e-6, 0.2)


class Line(nn.Module):
    """An MLP of another kind: one affine map."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(tiny.HIDDEN_SIZE, tiny.HIDDEN_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def with_affine_mlp(layer_idx: int) -> Adapter:
    """Return a tiny model of which one MLP is an affine map."""
    adapter = adapt(tiny.model("llama"))
    torch.manual_seed(3)
    line = Line().requires_grad_(False)
    layers = list(adapter.layers)
    layers[layer_idx] = replace(layers[layer_idx], mlp=lambda x, apply: line(x))
    return replace(adapter, layers=tuple(layers))


def as_floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((one, other)))[0, 1])


def test_a_sublayer_that_is_affine_is_replaced_by_itself() -> None:
    adapter = with_affine_mlp(1)
    tensors, errors = fit_units(adapter, units(adapter), WINDOWS, Plan.dense())
    assert errors[1, "mlp"] < 1e-4  # the ridge's penalty keeps it from 0
    assert min(error for unit, error in errors.items() if unit != (1, "mlp")) > 100 * errors[1, "mlp"]
    affine = AffineMap.named(as_floats(tensors), "shortcut.1.mlp", tiny.HIDDEN_SIZE)

    def see(_: Any, rows: SublayerRows) -> None:
        missed = (affine(rows.normed) - rows.output)[PROTECTED:].square().sum()
        assert float(missed / rows.output[PROTECTED:].square().sum()) < 1e-3

    watch_sublayers(adapter, [(1, "mlp")], UNSEEN[0], Plan.dense(), see)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_errors_are_the_mean_squared_ones_as_a_share_of_the_state(family: str) -> None:
    adapter = adapt(tiny.model(family))
    chosen = [(1, "mlp"), (2, "attention")]
    tensors, errors = fit_units(adapter, chosen, WINDOWS, Plan.dense())  # type: ignore[arg-type]
    found: dict[Any, list[Tensor]] = {unit: [] for unit in chosen}

    def see(unit: Any, rows: SublayerRows) -> None:
        affine = AffineMap.named(as_floats(tensors), f"shortcut.{unit[0]}.{unit[1]}", tiny.HIDDEN_SIZE)
        missed = rows.output - affine(rows.normed)
        found[unit].append((missed.square().sum(-1) / rows.state.square().sum(-1))[PROTECTED:])

    for window in WINDOWS:
        watch_sublayers(adapter, chosen, window, Plan.dense(), see)  # type: ignore[arg-type]
    for unit in chosen:
        assert errors[unit] == pytest.approx(float(torch.cat(found[unit]).mean()), rel=0.02)  # type: ignore[index]


def test_gates_of_shortcuts_know_where_the_maps_err() -> None:
    """On the text they were fitted to, through the rule's own reading of the gate; they are right on average."""
    adapter, chosen = adapt(tiny.model("llama")), [(1, "mlp"), (3, "mlp")]
    tensors, _ = fit_units(adapter, chosen, WINDOWS, Plan.dense())  # type: ignore[arg-type]
    tensors, told, true = as_floats(tensors), [], []

    def see(unit: Any, rows: SublayerRows) -> None:
        name = f"shortcut.{unit[0]}.{unit[1]}"
        missed = rows.output - AffineMap.named(tensors, name, tiny.HIDDEN_SIZE)(rows.normed)
        true.append((missed.square().sum(-1) / rows.state.square().sum(-1)).log()[PROTECTED:])
        told.append(shortcut_error(tensors[f"{name}.gate"], rows.normed, rows.state)[PROTECTED:])

    for unit in chosen:
        told.clear(), true.clear()
        for window in WINDOWS:
            watch_sublayers(adapter, [unit], window, Plan.dense(), see)  # type: ignore[list-item]
        predicted, actual = torch.cat(told), torch.cat(true)
        assert correlation(predicted, actual) > 0.5
        assert float(predicted.mean()) == pytest.approx(float(actual.mean()), abs=0.05)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_a_mapped_state_predicts_more_like_the_full_model(family: str) -> None:
    adapter = adapt(tiny.model(family))
    tensors = as_floats(fit_maps(adapter, LAYERS, WINDOWS))
    assert {name.split(".")[1] for name in tensors} == {"1", "2"}
    for i in LAYERS:
        affine, raw, mapped = AffineMap.named(tensors, f"output.{i}", tiny.HIDDEN_SIZE), 0.0, 0.0
        for window in UNSEEN:
            states = [state[PROTECTED:] for state in layer_states(adapter, window)]
            after = states[i + 1]
            raw += float(divergence(adapter, states[-1], after).mean())
            mapped += float(divergence(adapter, states[-1], after + affine(after)).mean())
        assert mapped < 0.9 * raw


def test_a_divergence_is_never_negative_and_none_from_itself() -> None:
    adapter = adapt(tiny.model("llama"))
    states = layer_states(adapter, UNSEEN[0])
    assert float(divergence(adapter, states[-1], states[-1]).abs().max()) == 0.0
    nats = divergence(adapter, states[-1], states[1])
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(adapter.head(adapter.final_norm(x)), -1) for x in (states[-1], states[1]))
    wanted = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(nats, wanted, atol=tolerances.DIVERGENCE, rtol=tolerances.DIVERGENCE)
    assert float(nats.min()) > 0.0


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_gates_know_what_halting_costs(family: str) -> None:
    adapter = adapt(tiny.model(family))
    tensors = fit_maps(adapter, LAYERS, WINDOWS)
    gates = as_floats(fit_gates(adapter, tensors, LAYERS, WINDOWS))
    assert set(gates) == {"gate.1.weight", "gate.2.weight"}
    for i in LAYERS:
        affine = AffineMap.named(as_floats(tensors), f"output.{i}", tiny.HIDDEN_SIZE)
        told, true = [], []
        for window in WINDOWS:
            states = [state[PROTECTED:] for state in layer_states(adapter, window)]
            features = gate_features(states[i], states[i + 1], states[i] - states[i - 1])
            told.append(features @ gates[f"gate.{i}.weight"][:-1] + gates[f"gate.{i}.weight"][-1])
            true.append(divergence(adapter, states[-1], states[i + 1] + affine(states[i + 1])).log())
        predicted, actual = torch.cat(told), torch.cat(true)
        assert correlation(predicted, actual) > 0.4
        assert float(predicted.mean()) == pytest.approx(float(actual.mean()), abs=0.05)


def test_deeper_shortcuts_are_fitted_on_states_that_shallower_ones_changed() -> None:
    adapter = adapt(tiny.model("llama"))
    chosen = (Shortcut(2, "attention"), Shortcut(0, "mlp"), Shortcut(2, "mlp"))  # in no order
    alone, _ = fit_units(adapter, [(each.layer, each.part) for each in chosen], WINDOWS, Plan.dense())
    steps_taken: list[None] = []
    together = fit_in_order(adapter, chosen, WINDOWS, lambda: steps_taken.append(None))
    assert len(steps_taken) == 2 * len(chosen) * len(WINDOWS)
    assert {name.rsplit(".", 1)[0] for name in together} == {each.name for each in chosen}
    assert torch.equal(together["shortcut.0.mlp.bias"], alone["shortcut.0.mlp.bias"])  # nothing comes before
    for name in ("shortcut.2.attention.bias", "shortcut.2.mlp.bias"):
        assert float((together[name] - alone[name]).abs().max()) > 1e-3, name
    only = fit_in_order(adapter, chosen[:1], WINDOWS)
    assert torch.equal(only["shortcut.2.attention.bias"], alone["shortcut.2.attention.bias"])


def test_a_model_that_gives_nan_is_refused() -> None:
    adapter = adapt(tiny.model("llama"))
    layers = list(adapter.layers)
    layers[1] = replace(layers[1], mlp=lambda x, apply: x * float("nan"))
    spoilt = replace(adapter, layers=tuple(layers))
    with pytest.raises(ModelError, match="layer 1: the model's states are NaN"):
        fit_maps(spoilt, LAYERS, WINDOWS)
    with pytest.raises(ModelError, match=r"shortcut\.1\.mlp: the model's states are NaN"):
        fit_units(spoilt, [(1, "mlp")], WINDOWS, Plan.dense())


ALL = ("halting", "shortcuts", "skipping", "entries", "channels")


@pytest.fixture(scope="module")
def whole() -> tuple[CalibrationData, int]:
    """All that is fitted to a quantized model, and the steps that it reported."""
    counted: list[None] = []
    adapter = adapt(tiny.quantized("llama"))
    return fit(adapter, ALL, UNITS, WINDOWS[:4], (8, 4, 0), (0,), lambda: counted.append(None)), len(counted)


def test_everything_that_a_search_needs_is_there(whole: tuple[CalibrationData, int]) -> None:
    data, counted = whole
    assert counted == steps(adapt(tiny.quantized("llama")), ALL, 4)
    assert data.halt_layers == (1, 2)
    assert set(data.shortcuts) == set(units(adapt(tiny.quantized("llama"))))
    assert len(data.map_scores) == len(data.map_weights) == 4 * 7
    assert all(weight >= 0.0 and nats >= 0.0 for weight, nats in data.shortcuts.values())
    for name, tensor in data.tensors.items():
        assert bool(tensor.isfinite().all()), name


@pytest.mark.parametrize("mechanism", ALL)
def test_only_what_was_asked_for_is_fitted(mechanism: Any) -> None:
    adapter, counted = adapt(tiny.quantized("llama")), []
    data = fit(adapter, (mechanism,), UNITS, WINDOWS[:2], (8, 0), (), lambda: counted.append(None))
    assert len(counted) == steps(adapter, (mechanism,), 2)
    there = {
        "halting": bool(data.halt_layers),
        "shortcuts": bool(data.shortcuts),
        "skipping": bool(data.attention.points),
        "entries": data.entry_nats > 0.0,
        "channels": bool(data.map_scores),
    }
    assert there == {name: name == mechanism for name in ALL}


def test_a_file_gives_back_what_was_fitted(whole: tuple[CalibrationData, int], tmp_path: Path) -> None:
    data, path = whole[0], tmp_path / "data.safetensors"
    data_file.write(path, "key", data)
    again = data_file.read(path, "key", data.spec)
    assert again is not None
    for name in (
        "spec",
        "units",
        "halt_layers",
        "shortcuts",
        "map_weights",
        "attention",
        "entry_nats",
    ):
        assert getattr(again, name) == getattr(data, name), name
    assert list(again.shortcuts) == list(data.shortcuts)
    assert set(again.tensors) == set(data.tensors)
    for name, tensor in data.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
        assert again.tensors[name].dtype == tensor.dtype
    for one, other in zip(again.map_scores, data.map_scores, strict=True):
        assert torch.equal(one.counts, other.counts)
        assert (one.num_inputs, one.num_outputs, one.worth, one.lost) == (
            other.num_inputs,
            other.num_outputs,
            other.worth,
            other.lost,
        )


def test_a_file_of_nothing_gives_nothing(tmp_path: Path) -> None:
    spec = adapt(tiny.model("llama")).spec
    data_file.write(tmp_path / "data.safetensors", "key", CalibrationData(spec, UNITS))
    assert data_file.read(tmp_path / "data.safetensors", "key", spec) == CalibrationData(spec, UNITS)


def test_files_that_do_not_serve_are_as_good_as_none(whole: tuple[CalibrationData, int], tmp_path: Path) -> None:
    data, path = whole[0], tmp_path / "data.safetensors"
    assert data_file.read(path, "key", data.spec) is None  # missing
    assert data_file.read(tmp_path, "key", data.spec) is None  # a folder
    data_file.write(path, "key", data)
    assert data_file.read(path, "other", data.spec) is None
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert data_file.read(path, "key", data.spec) is None, size
    path.write_bytes(content)
    assert data_file.read(path, "key", data.spec) is not None
