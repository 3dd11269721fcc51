"""What a search may switch on, by the names that the command line gives it; needs no PyTorch."""

from typing import Literal

Mechanism = Literal["halting", "shortcuts", "skipping", "entries", "fusion", "channels"]

Objective = Literal["flops", "bitops", "weight_bytes", "kv_bytes", "seconds"]

MECHANISMS: dict[str, tuple[Mechanism, ...]] = {
    "halting": ("halting", "shortcuts"),
    "kv": ("skipping", "entries"),
    "fusion": ("fusion",),
    "precision": ("channels",),
}
"""Of each of a plan's mechanisms, what is searched."""
