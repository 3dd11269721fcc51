"""Names of the families the runtime can run; `registry.py` says how each is read."""

from __future__ import annotations

from typing import Any

from quicksilver.errors import UnsupportedModelError

FAMILIES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
"""transformers' `model_type`, and which adapter reads it."""


def check_family(config: Any) -> None:
    """Raise UnsupportedModelError where the configuration's family is not one of FAMILIES."""
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(f"model type {family!r} is not supported; supported: {known}")
