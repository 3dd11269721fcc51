"""Quantized folders whose files are whole and whose tensors are not those of the model are refused by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quicksilver
from quicksilver.errors import ModelError
from quicksilver.families.quantize import quantize_model
from quicksilver.loading.quantized import save_quantized
from quicksilver.weights.config import QuantizationConfig
from quicksilver.weights.storage import write_tensors
from tests import tiny

PATH = "model.layers.2.mlp.up_proj"
Edit = Callable[[dict[str, Tensor]], Any]


def form(**changes: int) -> Edit:
    """Return what sets some of what a matrix says of itself."""
    names = ("num_inputs", "num_outputs", "bits", "group_size", "zero", "shift", "version")

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, value in changes.items():
            tensors[f"{PATH}.form"][names.index(name)] = value

    return edit


def without(part: str) -> Edit:
    return lambda tensors: tensors.pop(f"{PATH}.{part}")


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({f"{PATH}.{part}": change(tensors[f"{PATH}.{part}"]).contiguous()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    model = tiny.from_config(tiny.CONFIGS["llama"]())
    quantize_model(model, QuantizationConfig())
    save_quantized(model, folder)
    return folder


def refusal(whole: Path, folder: Path, edit: Edit) -> str:
    """Return the line that refuses a folder whose tensors were edited."""
    tensors: Mapping[str, Tensor] = load_file(whole / "model.safetensors")
    edit(tensors)  # type: ignore[arg-type]
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    write_tensors(tensors, folder)
    with pytest.raises(ModelError) as caught:
        quicksilver.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (without("form"), (".form'", "missing")),
        (without("high"), (".high'", "missing")),
        (without("low"), (".low'", "missing")),
        (without("steps"), (".steps'", "missing")),
        (without("zeros"), (".form'", "neither offsets nor zeros")),
        (without("block_steps"), (".steps'", "uint8, not int16")),
        (form(version=2), (".form'", "version 2")),
        (form(num_outputs=49), (".form'", "[49, 32]", "[48, 32]")),
        (form(num_inputs=64), (".form'", "[48, 64]")),
        (form(bits=5), (".form'", "5 bits")),
        (form(bits=4), (".low'", "unexpected")),
        (form(bits=6), (".low'", "shape")),
        (form(group_size=48), (".form'", "groups of 48")),
        (form(group_size=16), (".steps'", "shape")),
        (form(zero=3), (".form'", "has zeros and form")),
        (form(zero=300), (".form'", "zero of 300")),
        (form(shift=1000), (".form'", "shift of 1000")),
        (replaced("form", lambda t: t[:6]), (".form'", "shape [6]")),
        (replaced("form", lambda t: t.long()), (".form'", "int64")),
        (replaced("high", lambda t: t[:, :, :, :16]), (".high'", "shape")),
        (replaced("high", lambda t: t.flatten()), (".high'", "shape")),
        (replaced("steps", lambda t: t[:, :-1]), (".steps'", "shape")),
        (replaced("steps", lambda t: t.float()), (".steps'", "float32")),
        (replaced("block_steps", lambda t: t * 0 + 0x7C00), (".block_steps'", "NaN or infinite")),
        (lambda tensors: tensors.update(other=torch.ones(3)), ("'other'", "unexpected")),
        (lambda tensors: tensors.pop("model.norm.weight"), ("'model.norm.weight'", "missing")),
    ],
)
def test_what_does_not_fit_is_named(whole: Path, tmp_path: Path, edit: Edit, names: tuple[str, ...]) -> None:
    line = refusal(whole, tmp_path, edit)
    assert line.startswith(str(tmp_path))
    assert all(name in line for name in names), line


def test_an_unedited_folder_loads(whole: Path) -> None:
    assert quicksilver.load(whole)
