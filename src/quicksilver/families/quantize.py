"""Which linear maps of each family are quantized, and replacing them in a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.core.bits import MAX_BITS
from quicksilver.errors import ModelError
from quicksilver.families.family import MapRole, family_of, modeling_module
from quicksilver.families.modules import runs_only
from quicksilver.weights import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit, AnyPrecisionWeight
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.config import TAKEN_OVER, QuantizationConfig, is_quantized
from quicksilver.weights.planes import padded, unit_of
from quicksilver.weights.rounding import outline_of, quantize, walk_order

HEAD = "lm_head"
_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.sparse", "transformers.pytorch_utils")
"""Where modules that are no more than their weight and bias are defined."""

Encode = Callable[[str, Tensor], GroupedCodes]
"""Maps a map's name and its weight [out, in], or the embedding's and its table [vocab, d], to codes."""

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
    """Return the full paths of what is quantized: the layers' maps, and what else a configuration says.

    A table that the head and the token embedding share is named as the embedding's.
    """
    names = [name for group in input_groups(model) for name in group]
    if config is None:
        return names
    embedding = family_of(model.config).embedding
    tables = {HEAD: config.head and not shares_table(model, config), embedding: config.embeddings}
    return [*names, *(name for name, quantized in tables.items() if quantized)]


def is_tied(model: Any) -> bool:
    """Whether the head is the token embedding's table."""
    head, embedding = model.get_submodule(HEAD), model.get_submodule(_embedding(model))
    table = "high" if isinstance(head, AnyPrecisionWeight) else "weight"
    return getattr(head, table, None) is getattr(embedding, table, model)


def shares_table(model: Any, config: QuantizationConfig) -> bool:
    """Whether the head and the token embedding of a model, quantized so, are one table of codes."""
    return config.head and config.embeddings and is_tied(model)


def quantize_model(
    model: Any,
    config: QuantizationConfig,
    hessians: Mapping[str, Tensor] | None = None,
    on_map: Callable[[], None] = lambda: None,
) -> None:
    """Replace a model's linear maps by quantized ones, in place and one by one; on an error nothing is replaced.

    A head that shares the embedding's table shares it still where both are quantized; where it alone is, it gets one of
    its own. The shared table is rounded to the nearest levels, which is what the embedding needs.

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
    family, group_size = family_of(model.config), config.group_size
    names = quantized_names(model, config)
    maps = [name for name in names if name != family.embedding]
    for name in dict.fromkeys([*names, HEAD]) if config.head else names:
        _check_weight(model, name)
        after(model.get_submodule(name).weight)
    if config.method == "compensated":
        for name in maps:
            _check_hessian(name, hessians, _weight(model, name).shape[1])
        for name in {id(hessians[name]): name for name in reversed(maps)}.values():  # maps of one input share one
            _check_definite(name, hessians[name])
    assert group_size is not None

    def encode(name: str, weight: Tensor) -> GroupedCodes:
        codes = quantize(weight, group_size, hessians.get(name))
        after(model.get_submodule(name).weight)
        return codes

    yield from _replace_all(model, config, encode)


def outline(model: Any, config: QuantizationConfig) -> None:
    """Replace a model's linear maps by quantized ones without content, on "meta"."""
    check(model, config)
    group_size = config.group_size
    assert group_size is not None  # `check` refuses what is taken over
    for _ in _replace_all(model, config, lambda name, weight: outline_of(weight, group_size)):
        pass


def check(model: Any, config: QuantizationConfig) -> None:
    """Raise ModelError where a model cannot be quantized as configured."""
    if is_quantized(model.config) or any(isinstance(module, AnyPrecisionWeight) for module in model.modules()):
        raise ModelError("the model's weights are quantized already")
    if config.group_size is None:
        raise ModelError("method taken over quantizes nothing: weights come in codes")
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
    """Return a weight as [out, in]."""
    weight = model.get_submodule(name).weight.detach()
    return weight.T if is_inputs_first(model, name) else weight


def is_inputs_first(model: Any, name: str) -> bool:
    """Whether transformers keeps the weight of the map or table of a full path as [in, out]."""
    family = family_of(model.config)
    return family.inputs_first and name not in (HEAD, family.embedding)


def part_sizes(model: Any, name: str) -> list[int]:
    """Return the outputs of each of the maps that the map of a full path is; none for the head and the embedding."""
    family = family_of(model.config)
    roles = next((roles for path, roles in family.maps.items() if name.endswith(f".{path}")), ())
    return [family.shapes(model.config)[role].num_outputs for role in roles]


def part_shapes(model: Any, name: str) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the quantized maps, by full path, that stand for the map or table of a full path."""
    num_outputs, num_inputs = _weight(model, name).shape
    sizes = part_sizes(model, name)
    if len(sizes) <= 1:
        return {name: (num_outputs, num_inputs)}
    return {f"{name}.parts.{i}": (size, num_inputs) for i, size in enumerate(sizes)}


def _units(model: Any) -> dict[str, int]:
    """Return how many channels of a layer's maps are a unit, by full path: as many of all that read the same input.

    So that their channels are left out together, and maps can be joined. Those of 8 bits decide, and of 4: what codes
    of others have beside their leading four bits is half as long then.
    """
    totals = [
        (group, sum(padded(size) for name in group for size in part_sizes(model, name)))
        for group in input_groups(model)
    ]
    return {name: unit_of(total, MAX_BITS) for group, total in totals for name in group}


def _replace_all(model: Any, config: QuantizationConfig, encode: Encode) -> Iterator[tuple[str, nn.Module]]:
    from quicksilver.weights.registration import register_method

    register_method()  # the configuration will name it
    shared, untied = shares_table(model, config), config.head and is_tied(model)
    units = _units(model)
    for name in quantized_names(model, config):
        weights = [_weight(model, name)]
        if len(sizes := part_sizes(model, name)) > 1:
            weights = list(weights[0].split(sizes))
        module = put(model, name, [encode(name, weight) for weight in weights], units.get(name))
        if shared and name == family_of(model.config).embedding:
            share_table(model)
        yield name, module
    if untied and not shared:
        model.config.tie_word_embeddings = False
    model.config.quantization_config = config.to_dict()


def put(
    model: Any, name: str, parts: Sequence[GroupedCodes | Mapping[str, Tensor]], unit: int | None = None
) -> nn.Module:
    """Replace the map or table of a full path by one of codes, several where it is several maps; return it.

    `parts` are codes, `unit` of their channels together, or tensors as they are stored; biases stay what they are.
    """
    plain = model.get_submodule(name)
    if name == family_of(model.config).embedding:
        scale = getattr(plain, "scalar_embed_scale", None)
        module = _made(AnyPrecisionEmbedding, parts[0], unit, plain.weight.dtype, scale)
    else:
        biases = split_bias(getattr(plain, "bias", None), part_sizes(model, name))
        maps = [_made(AnyPrecisionLinear, *each) for each in zip(parts, repeat(unit), biases, strict=False)]
        module = maps[0] if len(maps) == 1 else AnyPrecisionSplit(maps)
    model.set_submodule(name, module)
    return module


def _made(kind: Any, part: GroupedCodes | Mapping[str, Tensor], unit: int | None, *rest: Any) -> Any:
    return kind(part, *rest, unit=unit) if isinstance(part, GroupedCodes) else kind.of_stored(part, *rest)


def split_bias(bias: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """Return the bias of each of the maps that are one, outputs end to end."""
    if bias is None or len(sizes) <= 1:
        return [bias] * max(len(sizes), 1)
    return [part.clone() for part in bias.split(sizes)]


def share_table(model: Any) -> None:
    """Let the head be the token embedding's table, which is quantized."""
    embedding = model.get_submodule(_embedding(model))
    bias = getattr(model.get_submodule(HEAD), "bias", None)
    head = AnyPrecisionLinear.of_stored(dict(embedding.named_buffers()), bias)
    model.set_submodule(HEAD, head)
    embedding.share(head)


def take_over(model: Any, weights: Iterable[tuple[str, GroupedCodes | Tensor]]) -> None:
    """Give a model its weights, codes as quantized maps and tables, nothing rounded anew.

    A head that is not among them is the embedding's table. Where some of the layers' maps are codes and others floats,
    which the runtime does not mix, all become floats: what the codes say, exactly in float32.

    Args:
        model: plain, its weights in any state, as `loading.quantized.blank` makes it.
        weights: all of them by transformers' names; codes are [out, in], floats as transformers keeps them.

    Raises:
        ModelError: one is missing, has no place, or is of another shape.
    """
    owners, units = dict(model.named_parameters(remove_duplicate=False)), _units(model)
    tied, given, plain = is_tied(model), set[str](), dict[str, Any]()
    for name, value in weights:
        if name not in owners:
            raise ModelError(f"weight {name!r} has no place in the model")
        given.add(name)
        path, shape = name.removesuffix(".weight"), tuple(owners[name].shape)
        if isinstance(value, GroupedCodes) and path not in (*units, HEAD, _embedding(model)):
            value = value.dequantize()  # positions, for one
        turned = isinstance(value, GroupedCodes) and is_inputs_first(model, path)
        found = tuple((value if isinstance(value, Tensor) else value.codes).shape)
        if found != (wanted := shape[::-1] if turned else shape):
            raise ModelError(f"weight {name!r} has shape {list(found)}, not {list(wanted)}")
        if isinstance(value, Tensor):
            set_tensor(model, name, value.to(owners[name].dtype))
            continue
        plain[path] = model.get_submodule(path)
        sizes = part_sizes(model, path)
        parts = [value.rows(at) for at in torch.arange(value.num_outputs).split(sizes)] if len(sizes) > 1 else [value]
        put(model, path, parts, units.get(path))
    head, table = f"{HEAD}.weight", f"{_embedding(model)}.weight"
    missing = [name for name in owners if name not in given and not (tied and name == head and table in given)]
    if missing:
        raise ModelError(f"weight {missing[0]!r} is missing")
    if plain and not plain.keys() >= units.keys():
        _expand(model, plain)
        plain = {}
    _finish(model, tied, head in given, bool(plain))


def _expand(model: Any, plain: Mapping[str, Any]) -> None:
    """Put plain modules back, by full path, with the weights that the codes in their places say."""
    for path, module in plain.items():
        quantized = model.get_submodule(path)
        parts: list[Any] = list(quantized.parts) if isinstance(quantized, AnyPrecisionSplit) else [quantized]
        weight = torch.cat([part.dequantize() for part in parts])
        weight = weight.T.contiguous() if is_inputs_first(model, path) else weight
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        model.set_submodule(path, module)


def set_tensor(model: Any, name: str, value: Tensor) -> None:
    """Set a parameter or a buffer of a model by its full name; the bias of a map that is several, of these."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if kind in module._buffers:
        module._buffers[kind] = value
        return
    modules, values = [module], [value]
    if isinstance(module, AnyPrecisionSplit):
        modules = list(module.parts)
        values = list(value.split([part.num_outputs for part in module.maps]))
    for each, part in zip(modules, values, strict=True):
        setattr(each, kind, nn.Parameter(part.clone(), requires_grad=False))


def _finish(model: Any, tied: bool, has_head: bool, quantized: bool) -> None:
    """Tie the head or not, and say in the configuration what is quantized."""
    from quicksilver.weights.registration import register_method

    head, embedding = model.get_submodule(HEAD), model.get_submodule(_embedding(model))
    if tied and has_head:
        model.config.tie_word_embeddings = False
    elif tied and isinstance(embedding, AnyPrecisionEmbedding):
        share_table(model)
    elif tied:
        head.weight = embedding.weight
    if quantized:
        register_method()
        tables = [isinstance(model.get_submodule(name), AnyPrecisionWeight) for name in (HEAD, _embedding(model))]
        model.config.quantization_config = QuantizationConfig(None, TAKEN_OVER, *tables).to_dict()


def _embedding(model: Any) -> str:
    return family_of(model.config).embedding
