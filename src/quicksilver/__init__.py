"""QuickSilver: run frozen decoder language models with less work per token.

>>> import quicksilver
>>> model = quicksilver.load("ref-llama", plan="settled")  # doctest: +SKIP
>>> model.generate(input_ids, max_new_tokens=20)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quicksilver.version import __version__

if TYPE_CHECKING:
    from quicksilver import errors, rules
    from quicksilver.loading.load import accelerate, load, load_tokenizer
    from quicksilver.plan import Plan

__all__ = ["Plan", "__version__", "accelerate", "errors", "load", "load_tokenizer", "rules"]

_LAZY = {
    "Plan": "quicksilver.plan",
    "accelerate": "quicksilver.loading.load",
    "errors": "quicksilver",
    "load": "quicksilver.loading.load",
    "load_tokenizer": "quicksilver.loading.load",
    "rules": "quicksilver",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that importing the package is quick and inert."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name in ("errors", "rules"):
        return importlib.import_module(f"{_LAZY[name]}.{name}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
