"""What a search may switch on, by the names that the command line gives it; needs no PyTorch."""

from typing import Literal

Mechanism = Literal["halting", "shortcuts", "values", "queries", "screening", "entries", "fusion", "channels"]

Objective = Literal["flops", "bitops", "weight_bytes", "kv_bytes", "seconds"]

MECHANISMS: dict[str, tuple[Mechanism, ...]] = {
    "halting": ("halting", "shortcuts"),
    "kv": ("values", "queries", "screening", "entries"),
    "fusion": ("fusion",),
    "precision": ("channels",),
}
"""Of each of a plan's mechanisms, what is searched."""

KNOBS: dict[Mechanism, str] = {
    "values": "skip_values_below",
    "queries": "drop_query_dims_below",
    "screening": "screen_keys_below",
}
"""Of what attention need not read, the field of `KVConfig` that has its thresholds."""
