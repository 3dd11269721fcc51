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
from quicksilver.families.quantize import HEAD, is_tied, quantized_names
from quicksilver.families.weights import FLOATS
from quicksilver.loading.plain import own_head, read_generation_config, some, warn
from quicksilver.loading.quantized import blank
from quicksilver.quant.storage import list_shards
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.packed import PARTS, unpack, zeros_in_doubt
from quicksilver.weights.packed_settings import METHODS, SIDE_FILES, PackedSettings, method_of

_KEY = "quantization_config"
_CODES = PARTS[0]
_CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Tensors of old files that are no weights; models compute them."""
_CALLER = 5  # frames from a generator of this file to whoever called `load`


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
        return any(name.endswith(f".{_CODES}") for name in _StoredTensors(folder).names)
    except ModelError:  # whoever reads the weights will say so
        return False


def float_model(folder: str | Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """Load a folder of GPTQ or AWQ as a plain model of transformers, on the CPU; in float32 with exactly its weights.

    Args:
        folder: holds config.json and safetensors.
        dtype: of the model; "auto" is the configuration's.

    Raises:
        ModelError: as `read_packed` does, or the configuration cannot be used.
        UnsupportedModelError: likewise, or the family is not supported.

    Warns:
        WeightFilesWarning: as `read_packed` does, or a head has a table where the configuration ties it.
    """
    model = _outline(Path(folder), dtype)
    family, maps = family_of(model.config), {f"{name}.weight" for name in quantized_names(model)}
    own, weights = model.state_dict(), {}
    for name, value in read_packed(folder, model):
        if isinstance(value, Tensor) and name == f"{HEAD}.weight" and is_tied(model):
            warn(own_head(folder))
        if isinstance(value, GroupedCodes):
            value = value.dequantize()
            value = value.T.contiguous() if family.inputs_first and name in maps else value
        weights[name] = value.to(own[name].dtype)
    if is_tied(model) and f"{HEAD}.weight" in weights:
        model.config.tie_word_embeddings = False
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
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
    settings, stored = _read_settings(folder), _StoredTensors(folder)
    doubted = []
    for name, packed in _match(model, stored, settings).items():
        shape = tuple(model.get_parameter(name).shape)
        if not packed:
            yield name, stored.read_plain(name, shape)
            continue
        module = name.removesuffix(".weight")
        if family_of(model.config).inputs_first and module != HEAD:
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


class _StoredTensors:
    """Tensors of a folder's safetensors by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        self._held: dict[str, tuple[Path, Any]] = {}
        for file, names in list_shards(folder).items():
            path = folder / file
            try:
                shard = safe_open(path, framework="pt")
                held = set(shard.keys())
            except FileNotFoundError:
                raise ModelError(f"{path}: this weight file is missing") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: the weight file is damaged or cut off: {first_line(error)}") from None
            for name in sorted(held ^ (held if names is None else names)):
                place = "its index does not" if name in held else "it does not, but its index does"
                raise ModelError(f"{path}: tensor {name!r}: {place} name it")
            self._held |= dict.fromkeys(held, (path, shard))
        self.names = frozenset(self._held)

    def describe(self, name: str) -> str:
        """Return how messages name a tensor: with its file, or the folder where it is missing."""
        path = self._held[name][0] if name in self._held else self._folder
        return f"{path}: tensor {name!r}"

    def read(self, name: str) -> Tensor:
        return self._held[name][1].get_tensor(name)

    def read_plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a weight that is not packed; ModelError where it is not what a model of this shape needs."""
        tensor = self.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self.describe(name)} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype not in FLOATS:
            raise ModelError(f"{self.describe(name)} is {str(tensor.dtype).removeprefix('torch.')}, not floats")
        if not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
            raise ModelError(f"{self.describe(name)} holds NaN or infinite values")
        return tensor


def _match(model: nn.Module, stored: _StoredTensors, settings: PackedSettings) -> dict[str, list[str]]:
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


def _parts_of(name: str, packable: set[str], stored: _StoredTensors) -> list[str]:
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


def _has_own_head(model: nn.Module, stored: _StoredTensors) -> bool:
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
