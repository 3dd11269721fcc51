"""Weights that are elsewhere, or in another form, and models in other packages' wrappers are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, GPT2DoubleHeadsModel, LlamaForSequenceClassification

import quicksilver
from quicksilver.errors import UnsupportedModelError
from tests import tiny, tolerances

IDS = tiny.token_ids(9)[None]
UP_PROJ = "model.layers.1.mlp.up_proj"


def fresh() -> Any:
    return tiny.from_config(tiny.CONFIGS["llama"]())


def set_weight(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Path], object]:
    """Return what puts another tensor in the place of one weight."""

    def change(model: Any, _: Path) -> None:
        module = model.get_submodule(UP_PROJ)
        module.weight = nn.Parameter(make(module.weight.detach()), requires_grad=False)

    return change


def offload(name: str) -> Callable[[Any, Path], object]:
    """Return what accelerate does to a model by one of its functions."""

    def change(model: Any, folder: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        arguments = {
            "cpu_offload": (),
            "disk_offload": (folder,),
            "dispatch_model": ({"": "cpu"}, None, None, folder),
        }
        options = {"force_hooks": True} if name == "dispatch_model" else {}
        getattr(accelerate, name)(model, *arguments[name], **options)

    return change


class OwnParameter(nn.Parameter):
    """As packages that quantize have them."""


def set_own_parameter(model: Any, _: Path) -> None:
    module = model.get_submodule(UP_PROJ)
    module.weight = OwnParameter(module.weight.detach())


def set_quantization(model: Any, _: Path) -> None:
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}


TAKEN: dict[str, tuple[str, Callable[[Any, Path], object]]] = {
    "meta": ("model.embed_tokens.weight.* meta device", lambda model, _: model.to("meta")),
    "sparse": (f"{UP_PROJ}.weight.* layout sparse", set_weight(lambda weight: weight.to_sparse())),
    "one on meta": (f"{UP_PROJ}.weight.* meta device", set_weight(lambda weight: weight.to("meta"))),
    "offloaded to the CPU": ("meta device.*accelerate|accelerate's", offload("cpu_offload")),
    "offloaded to disk": ("meta device.*accelerate|accelerate's", offload("disk_offload")),
    "dispatched": ("accelerate's .offloading, or a device map", offload("dispatch_model")),
    "tensor subclass": (f"{UP_PROJ}.weight.* TwoTensor", set_weight(lambda weight: TwoTensor(weight, weight))),
    "parameter subclass": (f"{UP_PROJ}.weight.* OwnParameter", set_own_parameter),
    "int8": (f"{UP_PROJ}.weight.* int8", set_weight(lambda weight: weight.to(torch.int8))),
    "float8": (f"{UP_PROJ}.weight.* float8_e4m3fn", set_weight(lambda weight: weight.to(torch.float8_e4m3fn))),
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_elsewhere_or_in_another_form_are_refused_when_a_model_is_taken_and_later(
    tmp_path: Path, name: str
) -> None:
    reason, change = TAKEN[name]
    model = fresh()
    accelerated = quicksilver.accelerate(model)
    accelerated(IDS)
    change(model, tmp_path)
    for run in (lambda: quicksilver.accelerate(model), lambda: accelerated(IDS)):
        with pytest.raises(UnsupportedModelError, match=f"^llama: .*({reason})") as refused:
            run()
        assert "\n" not in str(refused.value)


def test_what_another_package_has_quantized_is_refused() -> None:
    model = fresh()
    set_quantization(model, Path())
    with pytest.raises(UnsupportedModelError, match="quantized by another package"):
        quicksilver.accelerate(model)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_that_keeps_a_model_whole_is_no_obstacle(tmp_path: Path, device_map: str) -> None:
    pytest.importorskip("accelerate")
    fresh().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(
        quicksilver.accelerate(model)(IDS).logits, model(IDS).logits, atol=tolerances.LOGITS[torch.float32], rtol=0
    )


class CodedLinear(nn.Module):
    """A linear map in codes, as packages put in the place of PyTorch's: it has no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.abs().max()) / 127
        self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.get_buffer("codes").to(x.dtype) * self.scale).T


def code_all(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, CodedLinear(module))
    return model


def quantize_dynamically(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("change", [code_all, quantize_dynamically])
def test_maps_without_a_float_weight_run_as_they_are(change: Callable[[Any], Any]) -> None:
    model = change(fresh())
    with torch.no_grad():
        wanted = model(IDS).logits
    assert not torch.equal(wanted, fresh()(IDS).logits)
    logits = quicksilver.accelerate(model)(IDS).logits
    torch.testing.assert_close(logits, wanted, atol=tolerances.LOGITS[torch.float32], rtol=0)


OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "compiled": (r"OptimizedModule wraps a model.*\._orig_mod", lambda: torch.compile(fresh(), backend="eager")),
    "parallel": (r"DataParallel wraps a model.*\.module", lambda: nn.DataParallel(fresh())),
    "name": ("not str", lambda: "ref-llama"),
    "module": ("not Linear", lambda: nn.Linear(2, 2)),
    "body": ("LlamaModel has no language-model head", lambda: fresh().model),
    "classifier": ("no language-model head", lambda: LlamaForSequenceClassification(tiny.CONFIGS["llama"]())),
    "two heads": ("GPT2DoubleHeadsModel", lambda: GPT2DoubleHeadsModel(tiny.CONFIGS["gpt2"]())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_causal_language_model_of_transformers_is_refused_by_name(name: str) -> None:
    reason, make = OTHERS[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        quicksilver.accelerate(make())
