"""What a GGUF file says of an architecture: each key is asked for, or refused, as it may change what is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quicksilver.core.checks import is_whole
from quicksilver.errors import ModelError, UnsupportedModelError

_REQUIRED = object()


class Metadata:
    """The keys that begin with an architecture's name, each by what follows it.

    Raises:
        ModelError: the file does not name its architecture.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(f"general.architecture is {architecture!r}, not a name")
        self.architecture = architecture
        prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as it is."""
        self._asked.add(name)
        return self._values.get(name, default)

    def whole(self, name: str, default: Any = _REQUIRED) -> int:
        """Return a whole number above 0; of one for each layer, the one that all have."""
        value = self._one(name, default)
        if not is_whole(value) or value < 1:
            raise ModelError(f"{self.architecture}.{name} is {value!r}, not a whole number above 0")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Return a finite number above 0."""
        value = self._one(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelError(f"{self.architecture}.{name} is {value!r}, not a number above 0")
        return float(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Raise UnsupportedModelError where a key is there and has none of some values."""
        if (value := self.get(name, allowed[0])) not in allowed:
            raise UnsupportedModelError(f"{self.architecture}.{name} = {_short(value)} is not supported")

    def check_all_known(self) -> None:
        """Raise UnsupportedModelError naming a key that nobody has asked for."""
        for name in self._values.keys() - self._asked:
            raise UnsupportedModelError(
                f"{self.architecture}.{name} = {_short(self._values[name])} is not known, and may change what the model"
                " computes"
            )

    def _one(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.architecture}.{name} is missing")
        if isinstance(value, list):
            if not value or any(each != value[0] for each in value):
                raise UnsupportedModelError(
                    f"{self.architecture}.{name} = {_short(value)}: layers that differ are not supported"
                )
            return value[0]
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
