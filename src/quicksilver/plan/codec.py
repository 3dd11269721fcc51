"""Plans to and from JSON-ready values, with errors that name the offending key.

A rule is written as its name where it has no options, else as an object whose `type` is the name. Fields that are off
are left out. Long lists of numbers are kept apart, as arrays, and `{"array": NAME}` stands for each.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from quicksilver.errors import PlanError, first_line
from quicksilver.plan.tensors import Array
from quicksilver.rules.checks import parts
from quicksilver.rules.fusion.base import FUSION_RULES
from quicksilver.rules.halting.base import HALTING_RULES
from quicksilver.rules.kv.base import FILL_RULES
from quicksilver.rules.precision.base import PRECISION_RULES
from quicksilver.rules.registry import DecidingRule, RuleTypes
from quicksilver.rules.retired import refuse_retired

Read = Callable[[object, str], Array]
"""From the name of an array, and what names its place in errors, to its numbers."""

_RULES: tuple[RuleTypes[Any], ...] = (HALTING_RULES, FILL_RULES, FUSION_RULES, PRECISION_RULES)
_MAX_NESTING = 16
_SHORT = 8  # numbers of a list that stay in the JSON
_COLUMNS = 100  # columns of a line of JSON


def encode(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """Return a part of a plan, a rule, or what one holds, JSON-ready; PlanError where a rule has no name.

    Lists of more than eight numbers go to `arrays`, under their names from the plan on, as `name` is.
    """
    if isinstance(value, tuple):
        if len(numbers := _numbers(value)) > _SHORT and all(isinstance(each, float) for each in numbers):
            arrays[name] = value
            return {"array": name}
        return [encode(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    if not hasattr(value, "__dataclass_fields__"):
        return value
    encoded = {f.name: encode(getattr(value, f.name), f"{name}.{f.name}", arrays) for f in fields(value)
               if not _is_off(f, getattr(value, f.name))}  # fmt: skip
    if not isinstance(value, DecidingRule):
        return encoded
    rule = next(types for types in _RULES if isinstance(value, types.base)).name_of(type(value))
    return {"type": rule, **encoded} if encoded else rule


def _numbers(value: tuple[Any, ...]) -> list[Any]:
    return [number for each in value for number in (_numbers(each) if isinstance(each, tuple) else [each])]


def _is_off(field: Any, value: Any) -> bool:
    """Whether a field has a default that switches nothing on, and holds it."""
    return (not field.default or "off" in field.metadata) and value == field.default


def decode(cls: type, data: object, where: str, read: Read) -> Any:
    """Build a part of a plan from its JSON value; `where` names it in a PlanError, such as "mine.json: halting"."""
    values = _object(data, where)
    for name, held in parts(cls).items():
        if (value := values.get(name)) is None:
            continue
        named = f"{where}.{name}"
        if not held.many:
            values[name] = decode_rule(held.needed, value, named, read)
        elif isinstance(value, list):
            values[name] = [decode(held.needed, each, f"{named}[{i}]", read) for i, each in enumerate(value)]
        else:
            raise PlanError(f"{named} must be a list, got {repr(value)[:40]}")
    return _construct(cls, values, where, read)


def decode_rule(base: type, data: object, where: str, read: Read, depth: int = 0) -> Any:
    """Build a rule of a kind, which derives from `base`, from its JSON value; the rules that it holds recursively."""
    if depth > _MAX_NESTING:
        raise PlanError(f"{where}: rules are nested more than {_MAX_NESTING} deep")
    types = next(types for types in _RULES if types.base is base)
    values: dict[str, Any] = {"type": data} if isinstance(data, str) else _object(data, where)
    name = values.pop("type", None)
    refuse_retired(types.kind, name, where)
    try:
        cls = types.get(name) if isinstance(name, str) else None
    except PlanError as error:
        raise PlanError(f"{where}.type: {error}") from error
    if cls is None:
        raise PlanError(f"{where}.type must be one of {', '.join(types)}, got {name!r}")
    for key in getattr(cls, "rule_fields", ()):
        members, named = values.get(key), f"{where}.{key}"
        if not isinstance(members, list):
            raise PlanError(f"{named} must be a list of rules, got {members!r}")
        values[key] = [decode_rule(base, each, f"{named}[{i}]", read, depth + 1) for i, each in enumerate(members)]
    return _construct(cls, values, where, read)


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{where} must be an object, got {repr(data)[:40]}")
    return dict(data)


def _construct(cls: type, values: dict[str, Any], where: str, read: Read) -> Any:
    known = {f.name for f in fields(cls)}
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise PlanError(f"{where}.{f.name} is missing")
    for key, value in values.items():
        refuse_retired("key", key, where)
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}")
        if isinstance(value, dict) and value.keys() == {"array"}:
            values[key] = read(value["array"], f"{where}.{key}")
    try:
        return cls(**{key: _tuples(value) for key, value in values.items()})
    except (Exception, SystemExit) as error:  # a rule may be a user's
        source, _, part = where.rpartition(": ")
        said = first_line(error)
        named = said.startswith((f"{part}: ", f"{part}.", f"{part} "))  # most parts name themselves
        raise PlanError(f"{source if named else where}: {said}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def text(value: Any, indent: int = 0, used: int = 0) -> str:
    """Return JSON in which what fits into a line is in one, and so are numbers and words that follow one another.

    It stands behind `indent` columns, of its first line behind `used`.
    """
    line = json.dumps(value)
    if not value or not isinstance(value, (dict, list)) or used + len(line) <= _COLUMNS:
        return line
    pad, lines, packs = " " * (indent + 2), list[str](), False
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        start = f"{pad}{json.dumps(key)}: " if isinstance(value, dict) else pad
        item, plain = start + text(each, indent + 2, len(start)), not isinstance(each, (dict, list))
        if plain and packs and len(lines[-1]) + len(item) - len(pad) + 2 < _COLUMNS:
            lines[-1] += f", {item.strip()}"
        else:
            lines.append(item)
        packs = plain
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    inside = ",\n".join(lines)
    return f"{opening}\n{inside}\n{' ' * indent}{closing}"
