"""From a loaded model to its adapter; what is not of a known family is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.models import gpt2, llama
from quicksilver.models.families import FAMILIES, check_family
from quicksilver.models.kernels import head, resolve
from quicksilver.models.spec import Adapter
from quicksilver.ops.native import KernelChoice
from quicksilver.quant import NestedLinear

_ADAPTERS: dict[str, Callable[[Any], Adapter]] = {"gpt2": gpt2.adapt, "llama": llama.adapt}


def adapt(model: Any, kernels: KernelChoice = "auto") -> Adapter:
    """Return the adapter of a loaded transformers causal language model; no weight is copied.

    Args:
        model: the model.
        kernels: which kernels read its nested weights.

    Raises:
        UnsupportedModelError: the family, or an option of its configuration, is not supported.
        InputError: no such kernels.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.
    """
    check_family(model.config)
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise UnsupportedModelError(f"{model.config.model_type}: a model spread over {names} is not supported")
    if not hasattr(model, "lm_head"):
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head (lm_head)")
    _check_shape(model.config)
    adapter = _ADAPTERS[FAMILIES[model.config.model_type]](model)
    resolved = resolve(kernels, model, adapter.spec)
    if resolved == "native" and isinstance(model.lm_head, NestedLinear):
        by_kernels = partial(head, model.lm_head)
        adapter = replace(adapter, head=by_kernels, normed_head=partial(by_kernels, norm=adapter.final_norm))
    return replace(adapter, kernels=resolved)


def _check_shape(config: Any) -> None:
    """Raise ModelError where a size is impossible; what is possible and odd is left to transformers."""
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    sizes = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"{config.model_type}: {name} is {size}")
    if config.num_attention_heads % kv_heads:
        raise ModelError(
            f"{config.model_type}: {config.num_attention_heads} heads do not share {kv_heads} key/value heads evenly"
        )
