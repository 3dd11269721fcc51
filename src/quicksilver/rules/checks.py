"""What configurations of every mechanism check alike: thresholds, whole numbers, protection."""

import math
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from quicksilver.core.checks import is_whole
from quicksilver.errors import PlanError

Threshold = float | tuple[float, ...]
"""One absolute threshold for all layers, or one per layer."""

_PACKAGE = __name__.partition(".")[0] + "."

LARGE = 2**31
"""Bound of counts and positions in a plan, far above any model's context and far below what tensors hold."""


def threshold_at(threshold: Threshold, layer_idx: int) -> float:
    """Return the threshold that applies in or after layer `layer_idx`."""
    return threshold[layer_idx] if isinstance(threshold, tuple) else threshold


def check_threshold(owner: str, value: Any, name: str = "threshold") -> Threshold:
    """Return a threshold as floats; `owner` and `name` say which it is in the PlanError raised for anything else."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or item != item or abs(item) > 1e300:
            raise PlanError(f"{owner}: {name} must be a number or a list of numbers, got {repr(item)[:40]}")
    return tuple(map(float, values)) if isinstance(value, (tuple, list)) else float(value)


def check_bounded(owner: str, name: str, value: Any, most: float) -> Threshold:
    """Return thresholds from 0 to `most`; `owner` and `name` say which they are in the PlanError raised for others."""
    threshold = check_threshold(owner, value, name)
    for each in threshold if isinstance(threshold, tuple) else (threshold,):
        if not 0.0 <= each <= most:
            allowed = "be 0 or more" if math.isinf(most) else f"lie in [0, {most:g}]"
            raise PlanError(f"{owner}: {name} must {allowed}, got {each!r}")
    return threshold


def check_count(threshold: Threshold, num_layers: int) -> None:
    """Raise PlanError where a list of thresholds has not one for each of the model's layers."""
    if isinstance(threshold, tuple) and len(threshold) != num_layers:
        raise PlanError(f"{len(threshold)} thresholds, the model has {num_layers} layers")


def check_layers_run(what: str, value: object) -> None:
    """Raise PlanError where a count of layers is neither whole nor a fraction of the depth; `what` names it."""
    if not (is_whole(value) and value >= 1) and not (isinstance(value, float) and 0.0 < value < 1.0):
        raise PlanError(f"{what} must be at least 1, or a fraction in (0, 1), got {value!r}")


def layers_run(value: int | float, num_layers: int) -> int:
    """Return how many layers of a model a count is, or a fraction of its depth, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * num_layers)


def check_protection(owner: str, protect_first: object, protect_special: object, prefix: str = "") -> None:
    """Raise PlanError where what a mechanism may never touch is not given as a count and a switch."""
    owner = f"{owner}.{prefix}"
    if not is_whole(protect_first) or not 0 <= protect_first < LARGE:
        raise PlanError(f"{owner}protect_first must be a whole number from 0 to below 2**31, got {protect_first!r}")
    if not isinstance(protect_special, bool):
        raise PlanError(f"{owner}protect_special must be true or false, got {protect_special!r}")


def check_draw(owner: str, probability: Any, seed: object) -> None:
    """Raise PlanError where a random control's probability or seed is none."""
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not number or not 0.0 <= probability <= 1.0:
        raise PlanError(f"{owner}: probability must lie in [0, 1], got {probability!r}")
    if not is_whole(seed):
        raise PlanError(f"{owner}: seed must be a whole number, got {seed!r}")


class HeldField(NamedTuple):
    """What a field is declared to hold: one of a class, None instead where it is optional, or a tuple of them."""

    needed: type
    optional: bool
    many: bool


def check_parts(config: Any, owner: str, separator: str = ".") -> None:
    """Raise PlanError where a field of a plan or of a configuration holds another kind of part than it declares.

    Fields that are declared as numbers or texts have checks of their own. A list of parts becomes a tuple. In errors,
    `owner` and a separator stand before the field's name.
    """
    for name, part in parts(type(config)).items():
        value, where = getattr(config, name), f"{owner}{separator}{name}"
        if part.many:
            if not isinstance(value, (tuple, list)):
                plural = f"a tuple of {part.needed.__name__}s"
                raise PlanError(f"{where} must be {plural}, got {_described(value)}{_hint(type(config), part, value)}")
            object.__setattr__(config, name, tuple(value))
        members = value if part.many else () if part.optional and value is None else (value,)
        for member in members:
            if not isinstance(member, part.needed):
                what, hint = _described(member), _hint(type(config), part, member)
                needed = "hold" if part.many else "be"
                raise PlanError(f"{where} must {needed} {_article(part.needed.__name__)}, got {what}{hint}")


@cache
def parts(cls: type) -> dict[str, HeldField]:
    """Return those of a dataclass's fields that hold a class of this package, or a tuple of one."""
    hints, found = get_type_hints(cls), {}
    for name in (field.name for field in fields(cls)):
        declared = [each for each in get_args(hints[name]) or (hints[name],) if each not in (type(None), ...)]
        if len(declared) == 1 and isinstance(declared[0], type) and declared[0].__module__.startswith(_PACKAGE):
            optional = type(None) in get_args(hints[name])
            found[name] = HeldField(declared[0], optional, many=get_origin(hints[name]) is tuple)
    return found


def _hint(owner: type, part: HeldField, value: Any) -> str:
    """Return what to do about a value in the wrong place, from where else it fits."""
    if isinstance(value, type) and issubclass(value, part.needed):
        return f"; make one: {value.__name__}(...)"
    if part.many and isinstance(value, part.needed):
        return "; put it in a tuple"
    inside = parts(part.needed) if hasattr(part.needed, "__dataclass_fields__") else {}
    for name, each in inside.items():
        if isinstance(value, each.needed):
            return f"; it goes into a {part.needed.__name__}: {part.needed.__name__}({name}=...)"
    for name, each in parts(owner).items():
        if isinstance(value, each.needed):
            return f"; {name} holds {_article(each.needed.__name__)}"
    if made := [cls.__name__ for cls in _leaves(part.needed)]:
        return f"; there are {', '.join(made)}"
    return ""


def _leaves(cls: type) -> list[type]:
    """Return the classes under one that nothing derives from."""
    return [leaf for each in cls.__subclasses__() for leaf in _leaves(each) or [each]]


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    ours = type(value).__module__.startswith(_PACKAGE)
    return type(value).__name__ if ours else f"{repr(value)[:40]} ({type(value).__name__})"


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
