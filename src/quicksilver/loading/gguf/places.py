"""Which tensors of a GGUF file, and which of their rows in which order, the parameters of transformers' model are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.loading.gguf.architectures import Architecture

Shape = tuple[int, ...]

IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
"""Names of what is in a layer."""
ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that is no parameter: what rotary frequencies are divided by."""
_PROJECTIONS = ("attn_q", "attn_k", "attn_v")
_FUSED = "attn_qkv"


@dataclass(frozen=True)
class Place:
    """Where a parameter comes from."""

    tensor: str  # the name in the file; "" of a bias that is not in it, and 0
    rows: Tensor | None = None  # which of its rows [n], None for all as they are
    offset: float = 0.0  # what it holds more than in transformers


def find_places(
    stored: Mapping[str, Shape], wanted: Mapping[str, Shape], architecture: Architecture, config: Any
) -> dict[str, Place]:
    """Return where each parameter comes from.

    Args:
        stored: shapes of the file's tensors.
        wanted: shapes of the parameters, of linear maps [out, in].
        architecture: of the file.
        config: transformers'.

    Raises:
        UnsupportedModelError: a tensor is no parameter, so that the model is another than it seems.
        ModelError: a parameter has no tensor, or one of another shape.
    """
    places: dict[str, Place] = {}
    for name, shape in stored.items():
        if name == ROPE_FACTORS:
            continue
        parts = dict(_places_of(name, shape, architecture, config))
        for parameter, place in parts.items():
            if parameter not in wanted:
                raise _unknown(name, config)
            if parameter in places:
                raise ModelError(f"{name} and {places[parameter].tensor} are both {parameter}")
            num_rows = shape[0] if len(parts) == 1 or place.rows is None else len(place.rows)
            if (num_rows, *shape[1:]) != wanted[parameter]:
                raise ModelError(f"{name} is {list(shape)}, and {parameter}, made of it, is {list(wanted[parameter])}")
            places[parameter] = place
    for parameter in wanted:
        if parameter not in places and not parameter.endswith(".bias"):
            raise ModelError(f"there is no tensor for {parameter}")
    return {parameter: places.get(parameter, Place("")) for parameter in wanted}


def _places_of(name: str, shape: Shape, architecture: Architecture, config: Any) -> Iterator[tuple[str, Place]]:
    """Give the parameters that a tensor is, one or, where it is fused, three."""
    module, _, kind = name.rpartition(".")
    match = IN_LAYER.fullmatch(module)
    known = architecture.names if match is None else architecture.layer_names
    part = module if match is None else match[2]
    prefix = "" if match is None else f"{architecture.layers}.{match[1]}."
    if part == _FUSED and _FUSED not in known and match is not None:
        yield from _split(name, shape, architecture, config, prefix)
        return
    if part not in known or kind not in ("weight", "bias"):
        raise _unknown(name, config)
    offset = architecture.norm_offset if part.endswith("norm") else 0.0
    yield f"{prefix}{known[part]}.{kind}", Place(name, _order(part, architecture, config), offset)


def _split(
    name: str, shape: Shape, architecture: Architecture, config: Any, prefix: str
) -> Iterator[tuple[str, Place]]:
    """Give queries, keys and values, which are one tensor's rows one after the other."""
    counts = [_num_rows(part, config) for part in _PROJECTIONS]
    if sum(counts) != shape[0]:
        raise ModelError(f"{name} has {shape[0]} rows, and queries, keys and values have {sum(counts)}")
    for part, rows in zip(_PROJECTIONS, torch.arange(shape[0]).split(counts), strict=True):
        order = _order(part, architecture, config)
        kind = name.rpartition(".")[2]
        yield f"{prefix}{architecture.layer_names[part]}.{kind}", Place(name, rows if order is None else rows[order])


def _order(part: str, architecture: Architecture, config: Any) -> Tensor | None:
    """Return which row of queries or keys transformers has in each place; None where the order is the same.

    In `llama` the rows of a head that are rotated together are neighbours; in transformers they are half a head apart.
    """
    if not architecture.pairs_neighbours or part not in ("attn_q", "attn_k"):
        return None
    return torch.arange(_num_rows(part, config)).view(-1, config.head_dim // 2, 2).transpose(1, 2).flatten()


def _num_rows(part: str, config: Any) -> int:
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return heads * config.head_dim


def _unknown(name: str, config: Any) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name}: transformers' {type(config).__name__}, so configured, has no such tensor")
