"""GPTQ and AWQ maps and folders packed slowly, number by number, from the formulas of the tools that write them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quicksilver.families.family import family_of
from quicksilver.families.quantize import HEAD, is_inputs_first, quantized_names
from quicksilver.weights import AnyPrecisionSplit, AnyPrecisionWeight
from quicksilver.weights.storage import INDEX
from tests import tiny

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word holds, the lowest first
Writer = Literal["fields", "words", "smeared"]
"""How a tool takes 1 from zeros: from each field alone, from whole words, or before packing negative numbers."""


@dataclass
class DrawnMap:
    """A map as numbers: of input i in group g and output o, scales[g, o] * (codes[i, o] - zeros[g, o])."""

    codes: np.ndarray  # [in, out]
    zeros: np.ndarray  # [groups, out]
    scales: Tensor  # [groups, out]
    group_of: list[int]  # of each input
    bits: int

    def weight(self) -> Tensor:
        """Return the weights, [out, in] float32."""
        scales, (num_inputs, num_outputs) = self.scales.double().numpy(), self.codes.shape
        weight = np.empty((num_outputs, num_inputs))
        for i, group in enumerate(self.group_of):
            for o in range(num_outputs):
                weight[o, i] = scales[group, o] * (int(self.codes[i, o]) - int(self.zeros[group, o]))
        return torch.from_numpy(weight).float()

    def gptq(self, layout: str = "gptq", writer: Writer = "fields") -> dict[str, Tensor]:
        """Return the tensors that AutoGPTQ and GPTQModel write."""
        zeros = [[int(zero) for zero in row] for row in self.zeros]
        qzeros = [_words(row, self.bits) for row in zeros]
        if layout == "gptq" and writer == "words" and self.bits != 3:  # of 3, fields lie across words
            ones = sum(1 << place for place in range(0, 32, self.bits))
            qzeros = [[(word - ones) % 2**32 for word in row] for row in qzeros]
        elif layout == "gptq" and writer == "smeared":
            qzeros = [
                [_smeared(row[at : at + 32 // self.bits], self.bits) for at in _word_starts(row, self.bits)]
                for row in zeros
            ]
        elif layout == "gptq":
            qzeros = [_words([(zero - 1) % 2**self.bits for zero in row], self.bits) for row in zeros]
        qweight = [_words([int(code) for code in column], self.bits) for column in self.codes.T]
        return {
            "qweight": _int32(qweight).T.contiguous(),
            "qzeros": _int32(qzeros),
            "scales": self.scales.clone(),
            "g_idx": torch.tensor(self.group_of, dtype=torch.int32),
        }

    def awq(self) -> dict[str, Tensor]:
        """Return the tensors that AutoAWQ writes, of version "gemm"."""
        return {
            "qweight": _int32([_awq_words(row) for row in self.codes]),
            "qzeros": _int32([_awq_words(row) for row in self.zeros]),
            "scales": self.scales.clone(),
        }


def draw(
    num_outputs: int, num_inputs: int, bits: int = 4, group_size: int = 32, symmetric: bool = False, seed: int = 0
) -> DrawnMap:
    """Return a random map: codes and zeros of all values, scales of both signs, a zero and a subnormal one."""
    random = np.random.default_rng(seed)
    size = num_inputs if group_size == -1 else group_size
    group_of = [i // size for i in range(num_inputs)]
    shape = (group_of[-1] + 1, num_outputs)
    zeros = np.full(shape, 2 ** (bits - 1)) if symmetric else random.integers(0, 2**bits, shape)
    scales = torch.from_numpy(random.normal(scale=0.3 / 2**bits, size=shape)).half()
    scales[0, :2] = torch.tensor([0, 1], dtype=torch.int16).view(torch.float16)
    return DrawnMap(random.integers(0, 2**bits, (num_inputs, num_outputs)), zeros, scales, group_of, bits)


def _words(fields: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of fields one after another, the lowest bits first; the last word is filled with 0."""
    stream = sum(field << (bits * place) for place, field in enumerate(fields))
    return [(stream >> at) % 2**32 for at in range(0, bits * len(fields), 32)]


def _word_starts(fields: list[int], bits: int) -> range:
    return range(0, len(fields), 32 // bits)


def _smeared(zeros: list[int], bits: int) -> int:
    """Return a word of zeros less one, each as an unsigned 32-bit number, so that -1 fills all that is above it."""
    word = 0
    for place, zero in enumerate(zeros):
        word |= ((zero - 1) % 2**32) << (bits * place)
    return word % 2**32


def _awq_words(row: np.ndarray) -> list[int]:
    """Return the words of eight outputs each; the last one is filled with 0."""
    filled = [int(value) for value in row] + [0] * (-len(row) % 8)
    return [
        sum(filled[at + output] << (4 * nibble) for nibble, output in enumerate(AWQ_ORDER))
        for at in range(0, len(filled), 8)
    ]


def _int32(words: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).astype(np.int32))


@dataclass
class PackedFolder:
    """A folder in the making: change what is in it, then write it."""

    model: Any  # transformers', float32; holds what the folder should be read as
    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # config.json's quantization_config
    maps: dict[str, DrawnMap]  # by full path

    def write(self, path: Path, config: dict[str, Any] | None = None, **others: dict[str, Any]) -> Path:
        """Write it; `config` are keys to add to config.json, `others` files beside it by name."""
        self.model.config.save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        stored = json.loads((path / "config.json").read_text())
        stored |= {"quantization_config": self.settings} if self.settings else {}
        (path / "config.json").write_text(json.dumps({**stored, **(config or {})}))
        for name, content in others.items():
            (path / f"{name}.json").write_text(json.dumps(content))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path / "model.safetensors")
        return path

    def edit(self, name: str, part: str, tensor: Tensor | None) -> PackedFolder:
        """Replace a tensor of a map, or take it out."""
        self.tensors.pop(f"{name}.{part}", None)
        if tensor is not None:
            self.tensors[f"{name}.{part}"] = tensor
        return self


def packed_folder(
    name: str,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    layout: str = "gptq",
    writer: Writer = "words",
) -> PackedFolder:
    """Return the folder of a tiny model whose maps are random codes."""
    model = tiny.from_config(tiny.config_of(name))
    transposed = family_of(model.config).inputs_first
    tensors = {key: value.detach().clone() for key, value in model.named_parameters()}
    maps = {}
    for seed, path in enumerate(quantized_names(model)):
        weight = model.get_submodule(path).weight
        num_outputs, num_inputs = weight.shape[::-1] if transposed else weight.shape
        made = maps[path] = draw(num_outputs, num_inputs, bits, group_size, symmetric, seed)
        weight.data = made.weight().T.contiguous() if transposed else made.weight()
        del tensors[f"{path}.weight"]
        parts = made.awq() if method == "awq" else made.gptq(layout, writer)
        tensors |= {f"{path}.{part}": value for part, value in parts.items()}
    settings: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": group_size}
    if method == "awq":
        settings |= {"version": "gemm", "zero_point": True}
    else:
        settings |= {"checkpoint_format": layout, "sym": symmetric, "desc_act": False}
        settings |= {"meta": {"quantizer": ["gptqmodel:2.0.0"]}} if writer == "words" else {}
    return PackedFolder(model, tensors, settings, maps)


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return a model's weights by transformers' names and as transformers has them, those in codes as floats."""
    family, weights = family_of(model.config), dict(model.state_dict())
    for name in (*quantized_names(model), HEAD, family.embedding):
        module = model.get_submodule(name)
        parts = list(module.parts) if isinstance(module, AnyPrecisionSplit) else [module]
        if not isinstance(parts[0], AnyPrecisionWeight):
            continue
        weight = torch.cat([part.dequantize() for part in parts])
        biases = [getattr(part, "bias", None) for part in parts]
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        weights[f"{name}.weight"] = weight.T.contiguous() if is_inputs_first(model, name) else weight
        if biases[0] is not None:
            weights[f"{name}.bias"] = torch.cat(biases)
    return weights


def shard(path: Path) -> tuple[str, str]:
    """Cut a folder's file in two, a map's tensors among them; return the names of both."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {name: files[name.endswith(("scales", "norm.weight"))] for name in tensors}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files
