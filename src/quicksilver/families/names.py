"""Names of the families the runtime can run. A new one is registered here, by one line."""

from typing import Any

from quicksilver.errors import UnsupportedModelError

FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
}
"""transformers' `model_type`, and the file of this package that declares it, named as transformers' own package."""


def check_family(config: Any) -> None:
    """Raise UnsupportedModelError where the configuration's family is not one of FAMILIES."""
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(f"model type {family!r} is not supported; supported: {known}")
