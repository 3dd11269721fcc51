"""What plans could once name and no longer can, and what to use instead."""

from quicksilver.errors import PlanError

RETIRED: dict[str, dict[object, str]] = {
    "halting rule": {"any": "use 'all', or one of its rules alone"},
    "fill rule": {"share": "use 'drop' or 'propagate'"},
    "fusion rule": {"key": "use 'cosine'"},
    "weights": {"uniform": "use 'mass' or 'last'", "kv": "use 'last' or 'mass'"},
    "precision rule": {"capped": "use 'channel', or 'entropy' alone"},
    "score": {"activation": "leave score out; channels are scored by abs(x_j) * norm(W[j])"},
    "entropy": {True: "leave it out; entropy is that of the state itself"},
    "key": dict.fromkeys(
        (
            *("skip_values_below", "drop_query_dims_below", "screen_keys_below", "screen_query_dims_below"),
            *("attention.threshold", "attention.query_threshold", "screening.threshold"),  # of version 1
        ),
        "use kv.skip_below, one threshold in their place, and measure what the plan loses then",
    ),
    "bits": {bits: f"use {bits + 1}, which reads the same bytes" for bits in (1, 3, 5, 7)},
}
"""By what a plan names there: each value that is gone, and the way on."""


def refuse_retired(kind: str, value: object, where: str) -> None:
    """Raise PlanError where a value is retired; `where` says in a plan's words who names it."""
    try:
        instead = RETIRED[kind].get(value)
    except TypeError:  # unhashable, so none of these
        return
    if instead is not None:
        raise PlanError(f"{where}: {kind} {value!r} is retired: {instead}")
