"""What GPTQ and AWQ folders say about their packed weights, under any of the names that tools have given it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quicksilver.errors import ModelError, UnsupportedModelError

METHODS = ("gptq", "awq")
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json that may say it, and the method meant where they name none."""

_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}  # the first where none is named
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_GPTQ_FLAGS = {"sym": "symmetric", "desc_act": "ordered"}
_NAMES = {
    "method": ("quant_method", "method"),
    "format": ("checkpoint_format", "format", "version"),
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "sym": ("sym",),
    "zero_point": ("zero_point",),
    "desc_act": ("desc_act",),
    "dynamic": ("dynamic",),
    "meta": ("meta",),
}
"""What a folder says, by its first name here, and the names that tools give it."""

_BINDING = {*_NAMES} - {"meta", "desc_act"}
"""Those on which files must agree; of an order, the tensors tell."""


@dataclass(frozen=True)
class PackedSettings:
    """How the maps of a folder are packed."""

    source: str  # the file that says it
    method: Literal["gptq", "awq"]
    bits: int
    group_size: int  # inputs that share a scale, -1 for all
    symmetric: bool  # all zeros are the middle code
    ordered: bool  # inputs were quantized in another order than their own: `g_idx` says which are a group
    zero_offset: int = 0  # what a stored zero lacks: 1 in GPTQ's first format
    borrows: bool = False  # it was subtracted from whole words, so that a zero of 0 borrowed from the next
    overrides: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = ()  # of maps by name; the first counts

    @classmethod
    def read(cls, stated: Mapping[str, Any]) -> PackedSettings:
        """Read what files say, by their names; where several do, they must agree.

        Raises:
            ModelError: a value is missing or makes no sense, or two files contradict each other.
            UnsupportedModelError: the method, format, bits or kind of zeros are not supported.
        """
        known = {file: _canonical(file, data) for file, data in stated.items()}
        source, values = next(iter(known)), {}
        for file, data in known.items():
            for key in sorted(_BINDING.intersection(data, values)):
                if values[key] != data[key]:
                    raise ModelError(f"{source}: {key} is {values[key]!r}, but {file} says {data[key]!r}")
            values = {**data, **values}
        values.setdefault("method", SIDE_FILES.get(source.rpartition("/")[2]))
        return _settings(source, values)

    def of(self, name: str) -> PackedSettings:
        """Return those of a map by its name: GPTQ's `dynamic` may give it bits and groups of its own."""
        for pattern, values in self.overrides:
            if pattern.match(name):
                return replace(self, **values)
        return self


def method_of(data: Mapping[str, Any]) -> str | None:
    """Return the method that a `quantization_config` names, in lower case; None without any."""
    values = (data.get(name) for name in _NAMES["method"])
    return next((value.lower() for value in values if isinstance(value, str)), None)


def unsupported_method(source: object, method: object) -> UnsupportedModelError:
    """Return the refusal of a method that is neither ours nor one of METHODS; None where none is named."""
    named = "no quant_method is named" if method is None else f"quant_method {method!r}"
    return UnsupportedModelError(
        f"{source}: weights quantized by another package are not supported ({named}), but for {' and '.join(METHODS)}"
    )


def _canonical(file: str, data: Any) -> dict[str, Any]:
    """Return what a file says, each under its first name; what it leaves open is left out."""
    if not isinstance(data, Mapping):
        raise ModelError(f"{file}: the quantization settings must be an object, got {type(data).__name__}")
    values: dict[str, Any] = {}
    for key, names in _NAMES.items():
        for name in names:
            value = data.get(name)
            value = value.lower() if isinstance(value, str) else value
            if value is not None and values.setdefault(key, value) != value:
                raise ModelError(f"{file}: {name} is {value!r}, but the file says {values[key]!r} of the same too")
    if data.get("is_marlin_format"):
        values["format"] = "marlin"
    if data.get("backend") == "llm-awq":
        values["format"] = "llm-awq"
    return values


def _settings(source: str, values: Mapping[str, Any]) -> PackedSettings:
    method = values.get("method")
    if method not in METHODS:
        raise unsupported_method(source, method)
    layout = values.get("format", _FORMATS[method][0])
    if layout not in _FORMATS[method]:
        known = " and ".join(_FORMATS[method])
        raise UnsupportedModelError(f"{source}: {method} of format {layout!r} is not supported; {known} can be read")
    for key in ("bits", "group_size"):
        if key not in values:
            raise ModelError(f"{source}: the quantization settings do not say {key}")
    defaults = {"sym": True, "desc_act": False} if method == "gptq" else {}
    settings = PackedSettings(
        source,
        method,
        **_of_maps(source, method, {**defaults, **values}),
        zero_offset=1 if layout == "gptq" else 0,
        borrows=_borrows(values.get("meta")),
    )
    return replace(settings, overrides=_overrides(settings, values.get("dynamic", {})))


def _of_maps(source: str, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what maps may have of their own, of that what is given, as fields of PackedSettings."""
    found: dict[str, Any] = {key: values[key] for key in ("bits", "group_size") if key in values}
    for key, size in found.items():
        if type(size) is not int:
            raise ModelError(f"{source}: {key} must be a whole number, got {size!r}")
    if "bits" in found and found["bits"] not in _BITS[method]:
        known = ", ".join(map(str, _BITS[method]))
        raise UnsupportedModelError(f"{source}: {method} with {found['bits']} bits is not supported; known are {known}")
    if "group_size" in found and found["group_size"] < 1 and found["group_size"] != -1:
        raise ModelError(f"{source}: group_size must be above 0, or -1 for all inputs, got {found['group_size']}")
    flags = {key: values[key] for key in ("sym", "desc_act", "zero_point") if key in values}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise ModelError(f"{source}: {key} must be true or false, got {flag!r}")
    if method == "gptq":
        return found | {field: flags[key] for key, field in _GPTQ_FLAGS.items() if key in flags}
    if not flags.get("zero_point", not flags.get("sym", False)):
        raise UnsupportedModelError(f"{source}: awq without zero points (zero_point false, or sym) is not supported")
    return found | {"symmetric": False, "ordered": False}


def _borrows(meta: Any) -> bool:
    """Whether GPTQModel wrote the file, and by a version that converts zeros word by word, from 0.9 on."""
    named = meta.get("quantizer") if isinstance(meta, Mapping) else None
    tools = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    found = (re.match(r"gptqmodel:(\d+)\.(\d+)", tool.lower()) for tool in tools if isinstance(tool, str))
    return any(tuple(map(int, match.groups())) >= (0, 9) for match in found if match)


def _overrides(settings: PackedSettings, dynamic: Any) -> tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...]:
    """Read GPTQModel's `dynamic`: patterns from a name's beginning, "-:" before those of maps that stay plain."""
    if not isinstance(dynamic, Mapping):
        raise ModelError(f"{settings.source}: dynamic must be an object, got {dynamic!r}")
    overrides = []
    for key, given in dynamic.items():
        where = f"{settings.source}: dynamic {key!r}"
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise ModelError(f"{where}: no regular expression: {error}") from None
        values = {} if key.startswith("-:") else _canonical(where, given)
        if odd := sorted({"method", "format", "dynamic"}.intersection(values)):
            raise UnsupportedModelError(f"{where}: maps with a {odd[0]} of their own are not supported")
        overrides.append((pattern, _of_maps(where, settings.method, values)))
    return tuple(overrides)
