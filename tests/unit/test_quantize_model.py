"""Quantizing a model in memory, and the Hessians that make up for errors."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from quicksilver.calibrate.hessians import collect_hessians
from quicksilver.errors import InputError, ModelError, UnsupportedModelError
from quicksilver.families.quantize import (
    input_groups,
    is_inputs_first,
    is_tied,
    quantize_model,
    quantized_names,
    take_over,
)
from quicksilver.families.spec import quantized_maps
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.config import LAYERS_ONLY, QuantizationConfig
from quicksilver.weights.planes import padded, unit_of
from quicksilver.weights.rounding import quantize
from tests import tiny, tolerances

COMPENSATED = QuantizationConfig(method="compensated", embeddings=False)
WINDOWS = [tiny.token_ids(30).tolist(), tiny.token_ids(17, seed=1).tolist()]


def hooks(model: Any) -> int:
    """Return how many there are; transformers may have left some of its own."""
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_hessians_are_the_second_moments_of_the_inputs(name: str) -> None:
    model = tiny.model(name)
    names = quantized_names(model, COMPENSATED)
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in names}
    watchers = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, inputs, p=path: seen[p].append(inputs[0][0]))
        for path in names
    ]
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    for watcher in watchers:
        watcher.remove()
    before = hooks(model)
    hessians = collect_hessians(model, WINDOWS, head=True)
    assert hessians.keys() == set(names)
    for path in names:
        x = torch.cat(seen[path])  # [47, in]
        torch.testing.assert_close(hessians[path], x.T @ x, **tolerances.HESSIAN)
    assert hooks(model) == before


def test_hooks_are_removed_on_errors_too() -> None:
    model = tiny.model("llama")
    before = hooks(model)
    with pytest.raises(InputError, match=f"token id {tiny.VOCAB} is outside the vocabulary"):
        collect_hessians(model, [[1, tiny.VOCAB]])
    assert hooks(model) == before


def test_sums_are_kept_in_float32() -> None:
    model = copy.deepcopy(tiny.model("gpt2")).bfloat16()
    assert {h.dtype for h in collect_hessians(model, WINDOWS).values()} == {torch.float32}


def test_inputs_that_are_not_finite_are_named() -> None:
    model = copy.deepcopy(tiny.model("llama"))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        collect_hessians(model, WINDOWS)


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_errors_are_made_up_for(name: str) -> None:
    """On the calibration text the maps' own outputs at four bits come closer than with nearest levels."""
    plain = tiny.model(name)
    hessians = collect_hessians(plain, WINDOWS, head=True)
    models = {method: copy.deepcopy(plain) for method in ("nearest", "compensated")}
    for method, model in models.items():
        quantize_model(model, QuantizationConfig(method=method, embeddings=False), hessians)  # type: ignore[arg-type]
    errors = {
        method: sum(float(_error(model.get_submodule(path), plain, path, hessians)) for path in _whole(plain))
        for method, model in models.items()
    }
    assert errors["compensated"] < 0.9 * errors["nearest"]


def _whole(model: Any) -> list[str]:
    return [path for path in quantized_names(model, COMPENSATED) if not path.endswith("c_attn")]


@torch.no_grad()
def _error(module: AnyPrecisionLinear, plain: Any, path: str, hessians: Any) -> torch.Tensor:
    original = plain.get_submodule(path)
    weight = original.weight if isinstance(original, torch.nn.Linear) else original.weight.T
    difference = module.dequantize(4) - weight
    return torch.einsum("oi,ij,oj->", difference, hessians[path], difference)


def test_hessians_must_fit() -> None:
    plain = tiny.model("llama")
    hessians = collect_hessians(plain, WINDOWS)
    path = "model.layers.2.mlp.down_proj"
    cases = {
        "lm_head": hessians,
        path: hessians | {path: torch.eye(3)},
        "calibration": None,
        "NaN": hessians | {path: hessians[path] * float("nan")},
        rf"the Hessian of '{path}' is not positive definite": hessians | {path: -hessians[path]},
    }
    for match, given in cases.items():
        model = copy.deepcopy(plain)
        with pytest.raises(ModelError, match=match):
            quantize_model(
                model, QuantizationConfig(method="compensated", head=match == "lm_head", embeddings=False), given
            )
        assert not any(isinstance(module, AnyPrecisionLinear) for module in model.modules())


def test_weights_beyond_the_range_of_float32_are_refused_before_any_is_replaced() -> None:
    for dtype, values, message in (
        (torch.float32, [3e38, -3e38], "spans more than the range of float32"),
        (torch.float64, [1e39, 0.0], "holds NaN or infinite values"),
    ):
        model = copy.deepcopy(tiny.model("llama")).to(dtype)
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight[1, :2] = torch.tensor(values, dtype=dtype)
        with pytest.raises(ModelError, match=rf"'model\.layers\.3\.mlp\.down_proj\.weight' {message}"):
            quantize_model(model, LAYERS_ONLY)
        assert not any(isinstance(module, AnyPrecisionLinear) for module in model.modules())


def test_a_model_is_quantized_once_and_of_a_known_family() -> None:
    model = copy.deepcopy(tiny.model("llama"))
    quantize_model(model, LAYERS_ONLY)
    with pytest.raises(ModelError, match="quantized already"):
        quantize_model(model, LAYERS_ONLY)
    other = copy.deepcopy(tiny.model("llama"))
    other.config.model_type = "mamba"
    with pytest.raises(UnsupportedModelError, match="mamba"):
        quantize_model(other, LAYERS_ONLY)


def test_a_tied_head_is_quantized_with_the_embedding_or_not_at_all() -> None:
    model = copy.deepcopy(tiny.model("gpt2"))
    with pytest.raises(ModelError, match="head shares the embedding"):
        quantize_model(model, QuantizationConfig(head=False))
    quantize_model(model, QuantizationConfig(embeddings=False))
    assert model.transformer.wte.weight.dtype == torch.float32
    assert isinstance(model.lm_head, AnyPrecisionLinear)
    assert not model.config.tie_word_embeddings


def test_a_tied_head_and_the_embedding_are_one_table_of_codes() -> None:
    model = copy.deepcopy(tiny.model("gpt2"))
    names = quantized_names(model, QuantizationConfig())
    assert names[-1] == "transformer.wte"
    assert "lm_head" not in names
    quantize_model(model, QuantizationConfig())
    assert model.config.tie_word_embeddings
    assert is_tied(model)
    assert torch.equal(model.lm_head.dequantize(), model.transformer.wte(torch.arange(tiny.VOCAB)))
    assert model.lm_head.high is model.to(torch.float64).transformer.wte.high


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_maps_of_one_input_have_channels_in_the_same_units(name: str) -> None:
    model = copy.deepcopy(tiny.model(name))
    quantize_model(model, LAYERS_ONLY)
    for group in input_groups(model):
        maps = [each for path in group for each in quantized_maps(model, [path])]
        assert {each.unit for each in maps} == {unit_of(sum(padded(each.num_outputs) for each in maps), 8)}


def test_weights_that_are_taken_over_are_checked_by_name() -> None:
    model = tiny.model("gpt2")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    path = "transformer.h.1.mlp.c_fc.weight"
    codes = quantize(weights[path].T, 32)
    for given, message in (
        ({**weights, path: codes.rows(torch.arange(5))}, rf"'{path}' has shape \[5, 32\], not \[128, 32\]"),
        ({**weights, "transformer.ln_f.bias": torch.ones(3)}, r"'transformer\.ln_f\.bias' has shape \[3\]"),
        ({**weights, "nonesuch": torch.ones(3)}, "'nonesuch' has no place"),
        ({name: value for name, value in weights.items() if name != path}, rf"'{path}' is missing"),
    ):
        with pytest.raises(ModelError, match=message):
            take_over(copy.deepcopy(model), given.items())
    mixed = copy.deepcopy(model)
    take_over(mixed, {**weights, path: codes}.items())
    assert torch.equal(mixed.transformer.h[1].mlp.c_fc.weight, codes.dequantize().T)
    assert torch.equal(mixed.transformer.h[1].mlp.c_fc.bias, model.transformer.h[1].mlp.c_fc.bias)
    assert not hasattr(mixed.config, "quantization_config")


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_weights_that_are_taken_over_keep_their_codes(name: str, table: bool) -> None:
    """Whatever their bits; a head that shares the embedding's table shares its codes."""
    model = tiny.model(name)
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    names = quantized_names(model, QuantizationConfig(head=False, embeddings=table) if table else None)
    coded = {}
    for i, path in enumerate(names):
        weight = weights[f"{path}.weight"]
        made = quantize(weight.T if is_inputs_first(model, path) else weight, (16, 32, 128)[i % 3])
        bits = (8, 4, 6)[i % 3]
        coded[path] = dataclasses.replace(made, codes=made.codes >> (8 - bits), bits=bits)
    made = copy.deepcopy(model)
    take_over(made, ({**weights, **{f"{path}.weight": codes for path, codes in coded.items()}}).items())
    for path, codes in coded.items():
        module = made.get_submodule(path)
        found = torch.cat([part.dequantize() for part in getattr(module, "parts", [module])])
        assert torch.equal(found, codes.dequantize()), path
    for group in input_groups(made):
        assert len({part.unit for path in group for part in quantized_maps(made, [path])}) == 1
    assert is_tied(made) == is_tied(model)
    assert made.config.quantization_config["embeddings"] == table


def test_progress_is_told_after_every_map() -> None:
    model, calls = copy.deepcopy(tiny.model("gpt2")), []
    quantize_model(model, QuantizationConfig(embeddings=False), on_map=lambda: calls.append(len(calls)))
    assert len(calls) == len(quantized_names(model, COMPENSATED)) == 4 * 4 + 1
