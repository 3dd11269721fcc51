"""Which linear maps of each family are nested, and replacing them in a model.

How codes are chosen is `quant/rounding.py`'s business; how a nested model is stored, `loading/nested.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import ModelError
from quicksilver.families.modules import runs_only
from quicksilver.families.names import check_family
from quicksilver.quant import NestedEmbedding, NestedLinear, NestedSplit, NestedWeight
from quicksilver.quant.codes import NestedCodes
from quicksilver.quant.config import QuantizationConfig, is_nested
from quicksilver.quant.rounding import quantize, walk_order

HEAD = "lm_head"
_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.sparse", "transformers.pytorch_utils")
"""Where modules that are no more than their weight and bias are defined."""

Encode = Callable[[str, Tensor], NestedCodes]
"""Maps a map's name and its weight [in, out], or the embedding's and its table [vocab, d], to codes."""


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its linear maps.

    Attributes:
        body: path of the model without its head.
        layers: path of the layers.
        embedding: path of the token embedding.
        inputs: maps of a layer, by path within it; those that read the same input stand together.
        parts: maps that are several, their outputs end to end, and how many.
        inputs_first: weights are [in, out], not [out, in].
    """

    body: str
    layers: str
    embedding: str
    inputs: tuple[tuple[str, ...], ...]
    parts: Mapping[str, int] = field(default_factory=dict)
    inputs_first: bool = False

    def num_parts(self, name: str) -> int:
        """Return how many maps the map of a full path is."""
        return next((count for path, count in self.parts.items() if name.endswith(f".{path}")), 1)


_GPT2 = Layout(
    body="transformer",
    layers="transformer.h",
    embedding="transformer.wte",
    inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    parts={"attn.c_attn": 3},
    inputs_first=True,
)
_LLAMA = Layout(
    body="model",
    layers="model.layers",
    embedding="model.embed_tokens",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)
LAYOUTS = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def layout_of(model: Any) -> Layout:
    """Return where a model keeps its linear maps.

    Raises:
        UnsupportedModelError: the family is not supported.
    """
    check_family(model.config)
    return LAYOUTS[model.config.model_type]


def input_groups(model: Any) -> list[tuple[str, ...]]:
    """Return the layers' maps by full path, in order; those that read the same input stand together."""
    layout = layout_of(model)
    return [
        tuple(f"{layout.layers}.{i}.{path}" for path in paths)
        for i in range(len(model.get_submodule(layout.layers)))
        for paths in layout.inputs
    ]


def nested_names(model: Any, config: QuantizationConfig | None = None) -> list[str]:
    """Return the full paths of the maps that are nested: the layers', and the head where a configuration says so."""
    names = [name for group in input_groups(model) for name in group]
    return [*names, HEAD] if config is not None and config.head else names


def is_tied(model: Any) -> bool:
    """Whether the head is the token embedding's table."""
    embedding = model.get_submodule(layout_of(model).embedding)
    return getattr(model.get_submodule(HEAD), "weight", None) is getattr(embedding, "weight", model)


def nest(
    model: Any,
    config: QuantizationConfig,
    hessians: Mapping[str, Tensor] | None = None,
    on_map: Callable[[], None] | None = None,
) -> None:
    """Replace a model's linear maps by nested ones, in place and one by one; on an error nothing is replaced.

    Args:
        model: a causal language model of transformers.
        config: a head that shares the embedding's table gets one of its own where it is nested, and must be nested
            where the embedding is.
        hessians: [in, in] `X^T X` of each map's inputs by the map's name; `config.method` "compensated" needs them.
        on_map: called after each map.

    Raises:
        ModelError: as `nest_each` does.
        UnsupportedModelError: the family is not supported.
    """
    for _ in nest_each(model, config, hessians):
        if on_map is not None:
            on_map()


def nest_each(
    model: Any,
    config: QuantizationConfig,
    hessians: Mapping[str, Tensor] | None = None,
    after: Callable[[Tensor], None] = lambda weight: None,
) -> Iterator[tuple[str, nn.Module]]:
    """Do what `nest` does, and yield each map, and the embedding where it is nested, by full path once it is replaced.

    Args:
        model: as for `nest`.
        config: likewise.
        hessians: likewise.
        after: called with a weight that is not looked at again soon, or not at all.

    Raises:
        ModelError: the model is nested already, a weight or Hessian is NaN or infinite, a weight's range is beyond
            that of float32, a Hessian is missing, of another size or not positive definite, or the configuration
            does not fit the model.
        UnsupportedModelError: the family is not supported.
    """
    hessians = hessians if config.method == "compensated" else {}
    if hessians is None:
        raise ModelError("method compensated needs calibration text")
    check(model, config)
    layout = layout_of(model)
    names = nested_names(model, config)
    for name in [*names, layout.embedding] if config.embeddings else names:
        _check_weight(model, name)
        after(model.get_submodule(name).weight)
    if config.method == "compensated":
        for name in names:
            _check_hessian(name, hessians, len(_weight(model, name, layout)))
        for name in {id(hessians[name]): name for name in reversed(names)}.values():  # maps of one input share one
            _check_definite(name, hessians[name])

    def encode(name: str, weight: Tensor) -> NestedCodes:
        read_narrow = name != layout.embedding
        codes = quantize(weight, config.group_size, hessians.get(name), refit=read_narrow)
        after(model.get_submodule(name).weight)
        return codes

    yield from _replace_all(model, config, encode)


def outline(model: Any, config: QuantizationConfig) -> None:
    """Replace a model's linear maps by nested ones without content, to load stored codes into (on "meta").

    Raises:
        ModelError: the configuration does not fit the model.
        UnsupportedModelError: the family is not supported.
    """

    def encode(name: str, weight: Tensor) -> NestedCodes:
        num_inputs, num_outputs = weight.shape
        return NestedCodes.outline(num_inputs, num_outputs, config.group_size)

    check(model, config)
    for _ in _replace_all(model, config, encode):
        pass


def check(model: Any, config: QuantizationConfig) -> None:
    """Raise ModelError where a model cannot be nested as configured."""
    if is_nested(model.config) or any(isinstance(module, NestedWeight) for module in model.modules()):
        raise ModelError("the model's weights are nested already")
    if config.embeddings and not config.head and is_tied(model):
        raise ModelError("the head shares the embedding's table: to nest embeddings, nest the head too")


def _check_weight(model: Any, name: str) -> None:
    module = model.get_submodule(name)
    if not any(runs_only(module, source) for source in _PLAIN):
        raise ModelError(
            f"{name!r} ({type(module).__name__}) is more than its weight: merge adapters, remove hooks and put back"
            " replaced modules before the model is nested"
        )
    bounds = torch.stack(model.get_submodule(name).weight.detach().aminmax()).float()
    if not bool(torch.isfinite(bounds).all()):
        raise ModelError(f"weight '{name}.weight' holds NaN or infinite values")
    if not bool(torch.isfinite(bounds[1] - bounds[0])):
        raise ModelError(f"weight '{name}.weight' spans more than the range of float32")


def _check_hessian(name: str, hessians: Mapping[str, Tensor], size: int) -> None:
    if name not in hessians:
        raise ModelError(f"the Hessian of {name!r} is missing")
    if hessians[name].shape != (size, size):
        raise ModelError(f"the Hessian of {name!r} has shape {list(hessians[name].shape)}, not {[size, size]}")
    if not bool(torch.isfinite(hessians[name]).all()):
        raise ModelError(f"the Hessian of {name!r} holds NaN or infinite values")


def _check_definite(name: str, hessian: Tensor) -> None:
    """Raise ModelError where a Hessian cannot be factored; found before any weight is replaced."""
    try:
        walk_order(hessian)
    except ModelError:
        raise ModelError(f"the Hessian of {name!r} is not positive definite") from None


def _weight(model: Any, name: str, layout: Layout) -> Tensor:
    """Return a map's weight, [in, out]."""
    weight = model.get_submodule(name).weight.detach()
    return weight if layout.inputs_first and name != HEAD else weight.T


def _replace_all(model: Any, config: QuantizationConfig, encode: Encode) -> Iterator[tuple[str, nn.Module]]:
    from quicksilver.quant.registration import register_method

    register_method()  # the configuration will name it
    layout = layout_of(model)
    untied = config.head and is_tied(model)
    for name in nested_names(model, config):
        bias, weight = getattr(model.get_submodule(name), "bias", None), _weight(model, name, layout)
        module = _nested(weight, bias, layout.num_parts(name), partial(encode, name))
        model.set_submodule(name, module)
        yield name, module
    if config.embeddings:
        table = model.get_submodule(layout.embedding).weight
        module = NestedEmbedding(encode(layout.embedding, table), table.dtype)
        model.set_submodule(layout.embedding, module)
        yield layout.embedding, module
    if untied:
        model.config.tie_word_embeddings = False
    model.config.quantization_config = config.to_dict()


def _nested(weight: Tensor, bias: Tensor | None, parts: int, encode: Callable[[Tensor], NestedCodes]) -> nn.Module:
    """Return the nested map of a weight [in, out]; of equal parts of its outputs where it has several."""
    if parts == 1:
        return NestedLinear(encode(weight), bias)
    weights = weight.chunk(parts, dim=1)
    biases = [None] * parts if bias is None else [part.clone() for part in bias.chunk(parts)]
    return NestedSplit([NestedLinear(encode(w), b) for w, b in zip(weights, biases, strict=True)])
