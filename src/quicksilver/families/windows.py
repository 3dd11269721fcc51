"""How far back each layer's queries see, as transformers has it."""

from collections.abc import Sequence
from typing import Any, Literal

from quicksilver.errors import ModelError, UnsupportedModelError

Windows = Literal["none", "every layer", "by kind"]
"""Which layers `sliding_window` is for: none, whatever is declared; all; those whose kind says so."""

FULL, SLIDING = "full_attention", "sliding_attention"


def kinds_of(config: Any, layers: Sequence[Any]) -> list[str]:
    """Return the kind of each layer; transformers 5.0 keeps it in the layer, later releases look it up."""
    kinds = getattr(config, "layer_types", None) or [FULL] * len(layers)
    return [getattr(layer, "attention_type", kind) for layer, kind in zip(layers, kinds, strict=False)]


def layer_windows(config: Any, layers: Sequence[Any], windows: Windows, max_positions: int) -> list[int | None]:
    """Return how many keys a query of each layer may see, itself included; None where it sees the whole context.

    UnsupportedModelError names a layer whose window is not what transformers' masks of this family follow.
    """
    window, found = getattr(config, "sliding_window", None), []
    if window is not None and window < 1:
        raise ModelError(f"{config.model_type}: sliding_window is {window}")
    is_wide = window is not None and window >= max_positions
    for layer_idx, kind in enumerate(_kinds(config, layers, windows)):
        known = kind == FULL or (kind == SLIDING and window is not None and (is_wide or windows != "none"))
        if not known:
            what = f"sliding_window={window}" if kind == SLIDING else f"its type is {kind!r}"
            why = ": the family is declared without `windows`" if kind == SLIDING and windows == "none" else ""
            raise UnsupportedModelError(
                f"{config.model_type}: sliding-window attention in layer {layer_idx} ({what}) is not supported{why}"
            )
        found.append(None if kind == FULL or is_wide else window)
    return found


def _kinds(config: Any, layers: Sequence[Any], windows: Windows) -> list[str]:
    """Return the kind of each layer by which transformers masks it or, in other families, makes its cache."""
    declared, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if windows == "every layer" and window is not None:
        return [SLIDING] * len(layers)
    if declared is not None:
        return kinds_of(config, layers)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return [SLIDING if window is not None else "chunked_attention" if chunked else FULL] * len(layers)
