"""What a family of models declares: where its modules are, what its linear maps are, how a model of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quicksilver.families.names import FAMILIES, check_family

if TYPE_CHECKING:
    from quicksilver.families.spec import Adapter

MapRole = Literal["query", "key", "value", "output", "gate", "up", "down"]


class MapShape(NamedTuple):
    """Sizes of a linear map."""

    num_inputs: int
    num_outputs: int


@dataclass(frozen=True)
class Family:
    """A family's modules by path, `*` for the index of a layer, and how a model is read."""

    adapt: Callable[[Any], Adapter]  # reads a model of transformers
    # a configuration to the sizes of a layer's linear maps by role, in the order in which it applies them
    shapes: Callable[[Any], Mapping[MapRole, MapShape]]
    body: str  # path of the model without its head
    layers: str  # path of the layers
    embedding: str  # path of the token embedding
    # linear maps of a layer by path within it, in that order; of each the roles, several where it is several maps of
    # one input, their outputs end to end
    maps: Mapping[str, tuple[MapRole, ...]]
    # modules that the runtime runs itself, and the classes whose `forward` it stands in for; "" for what does nothing
    # when a frozen model runs (dropout, lists)
    run: Mapping[str, str]
    called: tuple[str, ...]  # other modules that it calls, besides linear maps
    inputs_first: bool = False  # weights of maps are [in, out], not [out, in]
    norm_offset: float = 0.0  # what the family's norms by the root mean square add to their weights

    @property
    def map_paths(self) -> tuple[str, ...]:
        """Full paths of the layers' maps."""
        return tuple(f"{self.layers}.*.{path}" for path in self.maps)


def family_of(config: Any) -> Family:
    """Return what the family of a configuration declares; UnsupportedModelError where it is not supported."""
    check_family(config)
    return declared_in(FAMILIES[config.model_type])


@cache
def declared_in(package: str) -> Family:
    """Return the declaration in a file of this package, one of the values of FAMILIES."""
    return import_module(f"quicksilver.families.{package}").FAMILY


def modeling_module(config: Any) -> str:
    """Return the name of the Python module of transformers that defines the classes of a configuration's family."""
    package = FAMILIES[config.model_type]
    return f"transformers.models.{package}.modeling_{package}"
