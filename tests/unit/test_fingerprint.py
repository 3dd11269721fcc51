"""Fingerprints tell models apart and do not depend on how one was loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch

from quicksilver.families.fingerprint import fingerprint
from quicksilver.families.quantize import quantize_model
from quicksilver.families.registry import adapt
from quicksilver.weights.config import LAYERS_ONLY, QuantizationConfig
from tests import tiny


def taken(model: Any) -> str:
    return fingerprint(model, adapt(model).spec)


def quantized(name: str, **options: Any) -> Any:
    model = copy.deepcopy(tiny.model(name))
    quantize_model(model, QuantizationConfig(**options))
    return model


def test_models_are_told_apart() -> None:
    models = [tiny.model("gpt2"), tiny.model("llama"), tiny.model("mistral"), quantized("llama")]
    models.append(quantized("llama", group_size=64))
    assert len({taken(model) for model in models}) == len(models)


def test_weights_count() -> None:
    model = copy.deepcopy(tiny.model("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert taken(model) != taken(tiny.model("llama"))
    quantize_model(model, LAYERS_ONLY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.high.bitwise_not_()
    changed = taken(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.high.bitwise_not_()
    assert changed != taken(model)


def test_the_dtype_it_is_loaded_in_does_not_count() -> None:
    model = copy.deepcopy(tiny.model("gpt2")).bfloat16()
    assert taken(copy.deepcopy(model).float()) == taken(model)
    narrow = quantized("qwen2")
    assert taken(copy.deepcopy(narrow).half()) == taken(copy.deepcopy(narrow).bfloat16()) == taken(narrow)
