"""From a loaded model to its adapter; what is not of a known family is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families import gpt2, llama
from quicksilver.families.kernels import head, resolve
from quicksilver.families.modules import ModuleLayout, ModuleWatch, causal_lm, check_nested_maps
from quicksilver.families.names import FAMILIES, check_family
from quicksilver.families.spec import Adapter
from quicksilver.families.weights import check_weights
from quicksilver.ops.native import KernelChoice
from quicksilver.quant import NestedLinear

_ADAPTERS: dict[str, Callable[[Any], Adapter]] = {"gpt2": gpt2.adapt, "llama": llama.adapt}
_MODULES: dict[str, ModuleLayout] = {
    "gpt2": gpt2.MODULES,
    "llama": llama.module_layout("Llama"),
    "mistral": llama.module_layout("Mistral"),
    "qwen2": llama.module_layout("Qwen2"),
    "qwen3": llama.module_layout("Qwen3"),
}


def adapt(model: Any, kernels: KernelChoice = "auto") -> Adapter:
    """Return the adapter of a loaded transformers causal language model; no weight is copied.

    Args:
        model: the model, or PEFT's wrapper of it.
        kernels: which kernels read its nested weights.

    Raises:
        UnsupportedModelError: the family, an option of its configuration, where or in what form its weights are, or
            what is on its modules or in their place is not supported.
        InputError: no such kernels.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.
    """
    base = causal_lm(model)
    check_family(base.config)
    family = base.config.model_type
    check_weights(base)
    if not hasattr(base, "lm_head"):
        raise UnsupportedModelError(f"{type(base).__name__} has no language-model head (lm_head)")
    _check_shape(base.config)
    adapter = _ADAPTERS[FAMILIES[family]](base)
    if len(adapter.layers) != adapter.spec.num_layers:
        found, declared = len(adapter.layers), adapter.spec.num_layers
        raise UnsupportedModelError(f"{family}: the model has {found} layers, and its configuration says {declared}")
    check_windows(base.config, adapter.spec.max_positions)
    if adapter.spec.is_nested:
        check_nested_maps(base, _MODULES[family])
    resolved = resolve(kernels, base, adapter.spec)
    if resolved == "native" and isinstance(base.lm_head, NestedLinear):
        by_kernels = partial(head, base.lm_head)
        adapter = replace(adapter, head=by_kernels, normed_head=partial(by_kernels, norm=adapter.final_norm))
    return replace(adapter, kernels=resolved, modules=ModuleWatch(model, _MODULES[family], resolved == "native"))


def _check_shape(config: Any) -> None:
    """Raise ModelError where a size is impossible; what is possible and odd is left to transformers."""
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(
            f"{config.model_type}: layers of several shapes (per_layer_config) are not supported"
        )
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


def check_windows(config: Any, max_positions: int) -> None:
    """Raise UnsupportedModelError naming the first layer to which transformers gives a window shorter than the context.

    Mistral's masks follow `sliding_window`, Qwen's `layer_types`; the cache of every family follows `layer_types`
    where there are any, else `sliding_window`.
    """
    family, window = config.model_type, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or (family == "mistral" and window is not None):
        chunk = getattr(config, "attention_chunk_size", None)
        kind = "full_attention" if chunk is None else "chunked_attention"
        kinds = [kind if window is None else "sliding_attention"] * config.num_hidden_layers
    for layer_idx, kind in enumerate(kinds[: config.num_hidden_layers]):
        is_full = kind == "sliding_attention" and window is not None and window >= max_positions
        if kind != "full_attention" and not is_full:
            what = f"sliding_window={window}" if kind == "sliding_attention" else f"its type is {kind!r}"
            raise UnsupportedModelError(
                f"{family}: sliding-window attention in layer {layer_idx} ({what}) is not supported"
            )
