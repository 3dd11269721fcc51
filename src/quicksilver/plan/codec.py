"""Plans to and from JSON-ready dictionaries, with errors that name the offending key.

The names of types are the file format: rules of halting and fusion register their own, the tables here hold the others.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from quicksilver import rules
from quicksilver.errors import PlanError, first_line
from quicksilver.plan.provenance import FittedTo
from quicksilver.rules.fusion import FUSION_RULES
from quicksilver.rules.halting import HALTING_RULES
from quicksilver.rules.registry import RuleTypes
from quicksilver.rules.retired import refuse_retired

FILL_TYPES: dict[str, type[rules.KVFill]] = {
    "drop": rules.DropFill,
    "zero": rules.ZeroFill,
    "propagate": rules.PropagateFill,
}
PRECISION_TYPES: dict[str, type[rules.PrecisionRule]] = {
    "uniform": rules.UniformWidthRule,
    "entropy": rules.EntropyWidthRule,
    "channel": rules.ChannelWidthRule,
}
_TABLES: dict[str, dict[str, type] | RuleTypes] = {
    "halting rule": HALTING_RULES,
    "kv fill": FILL_TYPES,
    "fusion rule": FUSION_RULES,
    "precision rule": PRECISION_TYPES,
}
_NAMES: dict[type, str] = {cls: name for table in (FILL_TYPES, PRECISION_TYPES) for name, cls in table.items()}
_FIXED: dict[type, tuple[str, object]] = {
    rules.ChannelWidthRule: ("score", "weighted"),
    rules.MapConfig: ("entropy", False),
}
"""Keys with one value left, which is written still, so that plans keep their hashes."""
_MAX_NESTING = 16


def encode(value: object) -> Any:
    """Return a rule or a fill as a dictionary with its type's name first; other values unchanged.

    Raises:
        PlanError: a rule of halting or fusion has no name.
    """
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, rules.Shortcut):
        return encode_fields(value)
    if isinstance(value, rules.HaltingRule):
        return {"type": HALTING_RULES.name_of(type(value)), **encode_fields(value)}
    if isinstance(value, rules.FusionRule):
        return {"type": FUSION_RULES.name_of(type(value)), **encode_fields(value)}
    if type(value) not in _NAMES:
        return value
    return {"type": _NAMES[type(value)], **encode_fields(value)}


def encode_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a rule, or of a mechanism's configuration, as a dictionary."""
    encoded = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if type(value) in _FIXED:
        key, only = _FIXED[type(value)]
        encoded[key] = only
    return encoded


def decode_halting(data: object, source: str) -> rules.HaltingConfig:
    """Build a halting configuration; `source` names the plan in errors."""
    values = _with_rule(data, f"{source}: halting")
    values["rule"] = decode_rule(values["rule"], f"{source}: halting.rule")
    return _construct(rules.HaltingConfig, values, f"{source}: halting")


def decode_fusion(data: object, source: str) -> rules.FusionConfig:
    """Build a fusion configuration; `source` names the plan in errors."""
    values = _with_rule(data, f"{source}: fusion")
    cls, rule = _typed(values["rule"], "fusion rule", f"{source}: fusion.rule")
    values["rule"] = _construct(cls, rule, f"{source}: fusion.rule")
    return _construct(rules.FusionConfig, values, f"{source}: fusion")


def decode_precision(data: object, source: str) -> rules.PrecisionConfig:
    """Build a precision configuration; `source` names the plan in errors."""
    values = _with_rule(data, f"{source}: precision")
    cls, rule = _typed(values["rule"], "precision rule", f"{source}: precision.rule")
    values["rule"] = _construct(cls, rule, f"{source}: precision.rule")
    return _construct(rules.PrecisionConfig, values, f"{source}: precision")


def decode_maps(data: object, source: str) -> rules.MapConfig:
    """Build a configuration of fitted maps; `source` names the plan in errors."""
    return _construct(rules.MapConfig, _object(data, f"{source}: maps"), f"{source}: maps")


def decode_attention(data: object, source: str) -> rules.AttentionConfig:
    """Build a configuration of attention; `source` names the plan in errors."""
    return _construct(rules.AttentionConfig, _object(data, f"{source}: attention"), f"{source}: attention")


def decode_screening(data: object, source: str) -> rules.ScreeningConfig:
    """Build a configuration of screening; `source` names the plan in errors."""
    return _construct(rules.ScreeningConfig, _object(data, f"{source}: screening"), f"{source}: screening")


def decode_entries(data: object, source: str) -> rules.EntryConfig:
    """Build a configuration of cache entries; `source` names the plan in errors."""
    return _construct(rules.EntryConfig, _object(data, f"{source}: entries"), f"{source}: entries")


def decode_shortcuts(data: object, source: str) -> rules.ShortcutConfig:
    """Build a configuration of shortcuts; `source` names the plan in errors."""
    where = f"{source}: shortcuts"
    values = _object(data, where)
    members = values.get("shortcuts")
    if not isinstance(members, list):
        raise PlanError(f"{where}.shortcuts must be a list, got {repr(members)[:40]}")
    values["shortcuts"] = tuple(
        _construct(rules.Shortcut, _object(member, f"{where}[{i}]"), f"{where}[{i}]")
        for i, member in enumerate(members)
    )
    return _construct(rules.ShortcutConfig, values, where)


def decode_fitted_to(data: object, source: str) -> FittedTo:
    """Build the record of what a plan was fitted to."""
    return _construct(FittedTo, _object(data, f"{source}: fitted_to"), f"{source}: fitted_to")


def _with_rule(data: object, where: str) -> dict[str, Any]:
    values = _object(data, where)
    if "rule" not in values:
        raise PlanError(f"{where}.rule is missing")
    return values


def decode_rule(data: object, where: str, depth: int = 0) -> rules.HaltingRule:
    """Build a halting rule from its dictionary; the rules that it holds recursively."""
    if depth > _MAX_NESTING:
        raise PlanError(f"{where}: rules are nested more than {_MAX_NESTING} deep")
    cls, values = _typed(data, "halting rule", where)
    for key in cls.rule_fields:
        members, named = values.get(key), f"{where}.{key}"
        if not isinstance(members, list):
            raise PlanError(f"{named} must be a list of rules, got {members!r}")
        values[key] = tuple(decode_rule(member, f"{named}[{i}]", depth + 1) for i, member in enumerate(members))
    return _construct(cls, values, where)


def decode_fill(data: object, source: str) -> rules.KVFill:
    """Build a KV fill from its dictionary."""
    cls, values = _typed(data, "kv fill", f"{source}: kv")
    return _construct(cls, values, f"{source}: kv")


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{where} must be an object, got {repr(data)[:40]}")
    return dict(data)


def _typed(data: object, kind: str, where: str) -> tuple[Any, dict[str, Any]]:
    values, table = _object(data, where), _TABLES[kind]
    name = values.pop("type", None)
    refuse_retired(kind, name, where)
    try:
        cls = table.get(name) if isinstance(name, str) else None
    except PlanError as error:
        raise PlanError(f"{where}.type: {error}") from error
    if cls is None:
        raise PlanError(f"{where}.type must be one of {', '.join(table)}, got {name!r}")
    return cls, values


def _construct(cls: type, values: dict[str, Any], where: str) -> Any:
    if cls in _FIXED:
        key, only = _FIXED[cls]
        value = values.pop(key, only)
        refuse_retired(key, value, where)
        if value != only or type(value) is not type(only):
            raise PlanError(f"{where}: {key} must be left out, got {value!r}")
    known = {f.name for f in fields(cls)}
    for key in values:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        source, _, part = where.rpartition(": ")
        said = first_line(error)
        named = said.startswith((f"{part}: ", f"{part}.", f"{part} "))  # most parts name themselves
        raise PlanError(f"{source if named else where}: {said}") from None
