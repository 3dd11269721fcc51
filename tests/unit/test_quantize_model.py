"""Quantizing a model in memory, and the Hessians that make up for errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quicksilver.calibrate.hessians import collect_hessians
from quicksilver.errors import InputError, ModelError, UnsupportedModelError
from quicksilver.families.quantize import quantize_model, quantized_names
from quicksilver.quant import AnyPrecisionLinear
from quicksilver.quant.config import QuantizationConfig
from tests import tiny, tolerances

COMPENSATED = QuantizationConfig(method="compensated", head=True)
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
        quantize_model(model, QuantizationConfig(method=method, head=True), hessians)  # type: ignore[arg-type]
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
    weight = original.weight.T if isinstance(original, torch.nn.Linear) else original.weight
    difference = module.codes.dequantize(4) - weight
    return torch.einsum("io,ij,jo->", difference, hessians[path], difference)


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
            quantize_model(model, QuantizationConfig(method="compensated", head=match == "lm_head"), given)
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
            quantize_model(model, QuantizationConfig())
        assert not any(isinstance(module, AnyPrecisionLinear) for module in model.modules())


def test_a_model_is_quantized_once_and_of_a_known_family() -> None:
    model = copy.deepcopy(tiny.model("llama"))
    quantize_model(model, QuantizationConfig())
    with pytest.raises(ModelError, match="quantized already"):
        quantize_model(model, QuantizationConfig())
    other = copy.deepcopy(tiny.model("llama"))
    other.config.model_type = "mamba"
    with pytest.raises(UnsupportedModelError, match="mamba"):
        quantize_model(other, QuantizationConfig())


def test_a_tied_head_is_quantized_with_the_embedding_or_not_at_all() -> None:
    model = copy.deepcopy(tiny.model("gpt2"))
    with pytest.raises(ModelError, match="head shares the embedding"):
        quantize_model(model, QuantizationConfig(embeddings=True))
    quantize_model(model, QuantizationConfig(head=True))
    assert model.transformer.wte.weight.dtype == torch.float32
    assert isinstance(model.lm_head, AnyPrecisionLinear)


def test_progress_is_told_after_every_map() -> None:
    model, calls = copy.deepcopy(tiny.model("gpt2")), []
    quantize_model(model, QuantizationConfig(head=True), on_map=lambda: calls.append(len(calls)))
    assert len(calls) == len(quantized_names(model, COMPENSATED)) == 4 * 4 + 1
