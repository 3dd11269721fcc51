"""Plans of version 1 as plans of version 2; this file goes with the next release."""

from typing import Any

from quicksilver.errors import PlanError
from quicksilver.rules.retired import refuse_retired

_RETIRED = {"attention": ("threshold", "query_threshold"), "screening": ("threshold",)}
"""Of parts that are no longer there: the keys that switched something on."""


def upgraded(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the JSON object of a plan of version 1 as one of version 2; its hash, of another text, is left out.

    PlanError says that a part is no object, or names what was there only then and is retired.
    """
    data = {key: value for key, value in data.items() if key != "hash"}
    old = {
        name: _taken(data, name, source)
        for name in ("halting", "kv", "maps", "shortcuts", "precision", "entries", *_RETIRED)
    }
    kv: dict[str, Any] = {}
    if (fill := old["kv"]) is not None:
        kv["fill"] = fill
    for name, keys in _RETIRED.items():
        part = _renamed(old[name] or {}, {key: key for key in ("threshold", "query_threshold")}, f"{source}: {name}")
        for key in keys:
            if _switches_on(part.get(key, 0.0)):
                refuse_retired("key", f"{name}.{key}", source)
    if old["entries"] is not None:
        kv |= {"bits": 8} | _renamed(old["entries"], {"bits": "bits"}, f"{source}: entries")
        if kv["bits"] is None:
            raise PlanError(f"{source}: entries: bits must be 8 or 16, got None")
    halting = old["halting"]
    if halting is not None and halting.get("rule") is None:
        raise PlanError(f"{source}: halting.rule is missing")
    new = {"halting": _halting(halting, old["maps"], old["shortcuts"], source), "kv": kv or None}
    new["precision"] = _precision(old["precision"], source)
    return data | {name: part for name, part in new.items() if part is not None}


def _taken(data: dict[str, Any], name: str, source: str) -> Any:
    """Take a part out of a plan; None where there is none."""
    part = data.pop(name, None)
    if part is not None and not isinstance(part, dict):
        raise PlanError(f"{source}: {name} must be an object, got {repr(part)[:40]}")
    return part


def _switches_on(threshold: Any) -> bool:
    """Whether anything lies below a threshold, or below one of a list."""
    return any(each != 0 for each in threshold) if isinstance(threshold, list) else threshold != 0


def _renamed(part: dict[str, Any], keys: dict[str, str], where: str) -> dict[str, Any]:
    for key in part:
        if key not in keys:
            raise PlanError(f"{where}: unknown key {key!r}")
    return {keys[key]: value for key, value in part.items()}


def _halting(halting: Any, maps: Any, shortcuts: Any, source: str) -> dict[str, Any] | None:
    new = dict(halting or {})
    if maps is not None:
        maps = _renamed(maps, {"output": "output_maps", "entropy": "entropy"}, f"{source}: maps")
        _refuse("entropy", maps.pop("entropy", False), False, f"{source}: maps")
        if (wanted := maps.get("output_maps", True)) is not False:
            new["output_maps"] = wanted
    if shortcuts is not None:
        names = ("shortcuts", "protect_first", "protect_special")
        own = _renamed(shortcuts, dict(zip(names, names, strict=True)), f"{source}: shortcuts")
        if not own.get("shortcuts"):
            raise PlanError(f"{source}: shortcuts must name at least one sublayer, and each one once")
        new["shortcuts"] = own.pop("shortcuts")
        own = {"protect_first": 4, "protect_special": True} | own
        new |= own if halting is None else {f"shortcuts_{name}": value for name, value in own.items()}
    return new or None


def _precision(precision: Any, source: str) -> dict[str, Any] | None:
    if precision is None or not isinstance(precision.get("rule"), dict):
        return precision
    where, rule = f"{source}: precision.rule", dict(precision["rule"])
    if rule.get("type") == "channel":
        _refuse("score", rule.pop("score", "weighted"), "weighted", where)
    rule = {{"width": "bits", "widths": "bits"}.get(key, key): value for key, value in rule.items()}
    return {**precision, "rule": rule}


def _refuse(key: str, value: object, only: object, where: str) -> None:
    """Refuse a value of a key that has only one left."""
    refuse_retired(key, value, where)
    if value != only or type(value) is not type(only):
        raise PlanError(f"{where}: {key} must be left out, got {value!r}")
