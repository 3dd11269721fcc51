"""Which linear maps of each family are quantized, and replacing them in a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import ModelError
from quicksilver.families.family import MapRole, family_of, modeling_module
from quicksilver.families.modules import runs_only
from quicksilver.quant import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit, AnyPrecisionWeight
from quicksilver.quant.codes import AnyPrecisionCodes
from quicksilver.quant.config import QuantizationConfig, is_quantized
from quicksilver.quant.rounding import quantize, walk_order

HEAD = "lm_head"
_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.sparse", "transformers.pytorch_utils")
"""Where modules that are no more than their weight and bias are defined."""

Encode = Callable[[str, Tensor], AnyPrecisionCodes]
"""Maps a map's name and its weight [in, out], or the embedding's and its table [vocab, d], to codes."""


_INPUTS: tuple[frozenset[MapRole], ...] = (
    frozenset({"query", "key", "value"}),
    frozenset({"output"}),
    frozenset({"gate", "up"}),
    frozenset({"down"}),
)
"""Maps of a layer that read the same input."""


def input_groups(model: Any) -> list[tuple[str, ...]]:
    """Return the layers' maps by full path, in order; those that read the same input stand together."""
    family = family_of(model.config)
    groups = [tuple(path for path, roles in family.maps.items() if alike.issuperset(roles)) for alike in _INPUTS]
    return [
        tuple(f"{family.layers}.{i}.{path}" for path in paths)
        for i in range(len(model.get_submodule(family.layers)))
        for paths in groups
    ]


def quantized_names(model: Any, config: QuantizationConfig | None = None) -> list[str]:
    """Return the full paths of the maps that are quantized: the layers', and the head where a configuration says so."""
    names = [name for group in input_groups(model) for name in group]
    return [*names, HEAD] if config is not None and config.head else names


def is_tied(model: Any) -> bool:
    """Whether the head is the token embedding's table."""
    embedding = model.get_submodule(family_of(model.config).embedding)
    return getattr(model.get_submodule(HEAD), "weight", None) is getattr(embedding, "weight", model)


def quantize_model(
    model: Any,
    config: QuantizationConfig,
    hessians: Mapping[str, Tensor] | None = None,
    on_map: Callable[[], None] = lambda: None,
) -> None:
    """Replace a model's linear maps by quantized ones, in place and one by one; on an error nothing is replaced.

    A head that shares the embedding's table gets one of its own, and must be quantized where the embedding is.

    Args:
        model: a causal language model of transformers.
        config: what is quantized, and how.
        hessians: [in, in] `X^T X` of each map's inputs by the map's name; `config.method` "compensated" needs them.
        on_map: called after each map.

    Raises:
        ModelError: the model is quantized already, a weight or Hessian is NaN or infinite, a weight's range is beyond
            that of float32, a Hessian is missing, of another size or not positive definite, or the configuration
            does not fit the model.
        UnsupportedModelError: the family is not supported.
    """
    for _ in quantize_each(model, config, hessians):
        on_map()


def quantize_each(
    model: Any,
    config: QuantizationConfig,
    hessians: Mapping[str, Tensor] | None = None,
    after: Callable[[Tensor], None] = lambda weight: None,
) -> Iterator[tuple[str, nn.Module]]:
    """Do what `quantize_model` does; yield each map, and a quantized embedding, by full path once it is replaced.

    `after` is called with each weight that is not looked at again soon, or not at all.
    """
    hessians = hessians if config.method == "compensated" else {}
    if hessians is None:
        raise ModelError("method compensated needs calibration text")
    check(model, config)
    family = family_of(model.config)
    names = quantized_names(model, config)
    for name in [*names, family.embedding] if config.embeddings else names:
        _check_weight(model, name)
        after(model.get_submodule(name).weight)
    if config.method == "compensated":
        for name in names:
            _check_hessian(name, hessians, len(_weight(model, name)))
        for name in {id(hessians[name]): name for name in reversed(names)}.values():  # maps of one input share one
            _check_definite(name, hessians[name])

    def encode(name: str, weight: Tensor) -> AnyPrecisionCodes:
        codes = quantize(weight, config.group_size, hessians.get(name), refit=name != family.embedding)
        after(model.get_submodule(name).weight)
        return codes

    yield from _replace_all(model, config, encode)


def outline(model: Any, config: QuantizationConfig) -> None:
    """Replace a model's linear maps by quantized ones without content, to load stored codes into (on "meta")."""

    def encode(name: str, weight: Tensor) -> AnyPrecisionCodes:
        return AnyPrecisionCodes.outline(weight.shape[0], weight.shape[1], config.group_size)

    check(model, config)
    for _ in _replace_all(model, config, encode):
        pass


def check(model: Any, config: QuantizationConfig) -> None:
    """Raise ModelError where a model cannot be quantized as configured."""
    if is_quantized(model.config) or any(isinstance(module, AnyPrecisionWeight) for module in model.modules()):
        raise ModelError("the model's weights are quantized already")
    if config.embeddings and not config.head and is_tied(model):
        raise ModelError("the head shares the embedding's table: to quantize embeddings, quantize the head too")


def _check_weight(model: Any, name: str) -> None:
    module = model.get_submodule(name)
    plain = (*_PLAIN, modeling_module(model.config)) if hasattr(module, "scalar_embed_scale") else _PLAIN
    if not any(runs_only(module, source) for source in plain):
        raise ModelError(
            f"{name!r} ({type(module).__name__}) is more than its weight: merge adapters, remove hooks and put back"
            " replaced modules before the model is quantized"
        )
    bounds = torch.stack(module.weight.detach().aminmax()).float()
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


def _weight(model: Any, name: str) -> Tensor:
    weight = model.get_submodule(name).weight.detach()
    return weight if family_of(model.config).inputs_first and name != HEAD else weight.T


def part_sizes(model: Any, name: str) -> list[int]:
    """Return the outputs of each of the maps that the map of a full path is."""
    family = family_of(model.config)
    roles = next((roles for path, roles in family.maps.items() if name.endswith(f".{path}")), ())
    return [family.shapes(model.config)[role].num_outputs for role in roles]


def _replace_all(model: Any, config: QuantizationConfig, encode: Encode) -> Iterator[tuple[str, nn.Module]]:
    from quicksilver.quant.registration import register_method

    register_method()  # the configuration will name it
    family = family_of(model.config)
    untied = config.head and is_tied(model)
    for name in quantized_names(model, config):
        bias = getattr(model.get_submodule(name), "bias", None)
        module = _quantized(_weight(model, name), bias, part_sizes(model, name), partial(encode, name))
        model.set_submodule(name, module)
        yield name, module
    if config.embeddings:
        plain = model.get_submodule(family.embedding)
        scale = getattr(plain, "scalar_embed_scale", None)
        module = AnyPrecisionEmbedding(encode(family.embedding, plain.weight), plain.weight.dtype, scale)
        model.set_submodule(family.embedding, module)
        yield family.embedding, module
    if untied:
        model.config.tie_word_embeddings = False
    model.config.quantization_config = config.to_dict()


def _quantized(
    weight: Tensor, bias: Tensor | None, sizes: Sequence[int], encode: Callable[[Tensor], AnyPrecisionCodes]
) -> nn.Module:
    """Return the quantized map of a weight [in, out]; of parts of its outputs where it has several."""
    if len(sizes) <= 1:
        return AnyPrecisionLinear(encode(weight), bias)
    weights = weight.split(list(sizes), dim=1)
    biases = [None] * len(sizes) if bias is None else [part.clone() for part in bias.split(list(sizes))]
    return AnyPrecisionSplit([AnyPrecisionLinear(encode(w), b) for w, b in zip(weights, biases, strict=True)])
