"""Folders of GPTQ and AWQ models: their weights by the model's names, packed maps as codes in groups."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import ModelError, WeightFilesWarning, first_line
from quicksilver.families.family import family_of
from quicksilver.families.quantize import HEAD, is_inputs_first, is_tied, quantized_names, take_over
from quicksilver.families.weights import FLOATS
from quicksilver.loading.plain import own_head, read_generation_config, some, warn
from quicksilver.loading.quantized import blank
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.packed import PARTS, unpack, zeros_in_doubt
from quicksilver.weights.packed_settings import METHODS, SIDE_FILES, PackedSettings, method_of
from quicksilver.weights.storage import Expected, StoredTensors

_KEY = "quantization_config"
_CODES = PARTS[0]
_CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Tensors of old files that are no weights; models compute them."""
_CALLER = 6  # frames from a generator of this file to whoever called `load`


def is_packed(source: str, config: Any) -> bool:
    """Whether a configuration of transformers, or a file beside it, says that a folder is one of GPTQ or AWQ.

    Files beside it count where config.json says nothing and tensors are packed.
    """
    stated = getattr(config, _KEY, None)
    if stated is not None:
        return method_of(stated) in METHODS
    folder = Path(source)
    if not any((folder / file).is_file() for file in SIDE_FILES):
        return False
    try:
        return any(name.endswith(f".{_CODES}") for name in StoredTensors(folder, checked=False).names)
    except ModelError:  # whoever reads the weights will say so
        return False


def packed_model(folder: str | Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load a folder of GPTQ or AWQ on the CPU, its codes as they are, as any-precision weights.

    Args:
        folder: holds config.json and safetensors.
        dtype: of the other weights; "auto" is the configuration's.

    Raises:
        ModelError: as `read_packed` does, or the configuration cannot be used.
        UnsupportedModelError: likewise, or the family is not supported.

    Warns:
        WeightFilesWarning: as `read_packed` does, or a head has a table where the configuration ties it.
    """
    model = _outline(Path(folder), dtype)
    tied = is_tied(model)
    take_over(model, read_packed(folder, model))
    if tied and not is_tied(model) and isinstance(model.get_submodule(HEAD), nn.Linear):
        warn(own_head(folder))
    return model


def read_packed(folder: str | Path, model: nn.Module) -> Iterator[tuple[str, GroupedCodes | Tensor]]:
    """Give each weight of a GPTQ or AWQ folder, by its name in a model of transformers, one at a time.

    What is packed, the tensors say: a map that has a `qweight` is given as codes [out, in], whatever the family's
    order is; other weights as they are stored. A tied head is given where the files hold one of its own.

    Args:
        folder: holds config.json and safetensors.
        model: the folder's model, on "meta" too; names and shapes count.

    Raises:
        ModelError: a file is missing or damaged, the settings are, nothing is packed, or a tensor is missing, has no
            place, has another shape or type than the model and the settings say, or is NaN or infinite.
        UnsupportedModelError: a format, or an order of inputs, that is not supported.

    Warns:
        WeightFilesWarning: programs disagree on what some zeros stand for.
    """
    folder = Path(folder)
    settings, stored = _read_settings(folder), StoredTensors(folder, checked=False)
    doubted, shapes = [], {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, packed in _match(model, stored, settings).items():
        shape = shapes[name]
        if not packed:
            yield name, _read_plain(stored, name, shape)
            continue
        module = name.removesuffix(".weight")
        if is_inputs_first(model, module):
            shape = shape[::-1]
        own, parts = settings.of(module), {part: stored.read(f"{module}.{part}") for part in packed}
        yield name, unpack(parts, own, shape, lambda part, module=module: stored.describe(f"{module}.{part}"))
        if zeros_in_doubt(parts["qzeros"], own, shape[0]):
            doubted.append(module)
    if doubted:
        warnings.warn(
            f"{folder}: some zeros of {some(doubted)} may have been 0 before 1 was taken from them, which programs"
            " have written in different ways; they are read as 0, and the zeros beside them as they stand",
            WeightFilesWarning,
            stacklevel=_CALLER,
        )


def _read_plain(stored: StoredTensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read a weight that is not packed; ModelError where it is not what a model of this shape needs."""
    tensor = stored.read(name, Expected(shape, FLOATS))
    if not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        raise ModelError(f"{stored.describe(name)} holds NaN or infinite values")
    return tensor


def _match(model: nn.Module, stored: StoredTensors, settings: PackedSettings) -> dict[str, list[str]]:
    """Return a model's weights by name, with the parts that are stored of those that are packed.

    Raises ModelError where one is missing, none is packed, or a tensor has no place.
    """
    packable = {*quantized_names(model), HEAD}
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found[name] = _parts_of(name, packable, stored)
    if is_tied(model) and _has_own_head(model, stored):
        found[f"{HEAD}.weight"] = _parts_of(f"{HEAD}.weight", packable, stored)
    if not any(found.values()):
        raise ModelError(f"{settings.source}: says {settings.method}, but no weight of the folder is quantized so")
    claimed = {name for name, parts in found.items() if not parts}
    claimed |= {f"{name.removesuffix('weight')}{part}" for name, parts in found.items() for part in parts}
    for name in sorted(stored.names - claimed):
        if _CONSTANTS.search(name) or (name == f"{HEAD}.weight" and is_tied(model)):
            continue
        biased = name.removesuffix("bias") + "weight"
        if name.endswith(".bias") and found.get(biased) and not bool(stored.read(name).any()):
            continue  # tools write one of zeros for maps that have none
        raise ModelError(f"{stored.describe(name)} has no place in the model that config.json describes")
    return found


def _parts_of(name: str, packable: set[str], stored: StoredTensors) -> list[str]:
    """Return the parts that are stored of a weight, none where it is plain; ModelError where it is neither."""
    if name in stored.names:
        return []
    module = name.removesuffix(".weight")
    if module in packable and f"{module}.{_CODES}" in stored.names:
        return [part for part in PARTS if f"{module}.{part}" in stored.names]
    beside = sorted(other for other in stored.names if other.startswith(f"{module}."))
    found = f"; stored in its place: {some(beside)}" if beside and module != name else ""
    either = f", and so is {f'{module}.{_CODES}'!r}" if module in packable else ""
    raise ModelError(f"{stored.describe(name)} is missing{either}{found}")


def _has_own_head(model: nn.Module, stored: StoredTensors) -> bool:
    """Whether files hold another head than the embedding's table, to which the model ties it."""
    plain, embedding = f"{HEAD}.weight", f"{family_of(model.config).embedding}.weight"
    if plain not in stored.names or embedding not in stored.names:
        return f"{HEAD}.{_CODES}" in stored.names
    return not torch.equal(stored.read(plain), stored.read(embedding))


def _outline(folder: Path, dtype: torch.dtype | str) -> Any:
    """Return the folder's model without weights, as plain modules."""
    from transformers import AutoConfig

    try:
        config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
        if hasattr(config, _KEY):
            delattr(config, _KEY)
        family_of(config)
        model = blank(config, (config.dtype or torch.float32) if dtype == "auto" else dtype)
    except ModelError:
        raise
    except Exception as error:  # a configuration may ask for anything
        raise ModelError(f"{folder}: cannot build the model of its configuration: {first_line(error)}") from None
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
    return model


def _read_settings(folder: Path) -> PackedSettings:
    """Read what config.json and the files beside it say; ModelError where none does."""
    config = _read_json(folder / "config.json")
    stated = {f"{folder / 'config.json'}: {_KEY}": config[_KEY]} if config.get(_KEY) is not None else {}
    stated |= {str(folder / file): _read_json(folder / file) for file in SIDE_FILES if (folder / file).is_file()}
    if not stated:
        raise ModelError(f"{folder}: neither config.json nor {' nor '.join(SIDE_FILES)} says how weights are packed")
    return PackedSettings.read(stated)


def _read_json(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold an object, not {type(data).__name__}")
    return data
