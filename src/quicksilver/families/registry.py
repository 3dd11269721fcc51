"""From a loaded model to its adapter; what is not of a known family is refused by name."""

from dataclasses import replace
from functools import partial
from typing import Any

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families.family import family_of
from quicksilver.families.kernels import head, resolve
from quicksilver.families.modules import ModuleWatch, causal_lm, check_quantized_maps
from quicksilver.families.spec import Adapter
from quicksilver.families.weights import check_weights
from quicksilver.ops.native import KernelChoice
from quicksilver.weights import AnyPrecisionLinear

_HEADS = ("num_attention_heads", "num_key_value_heads")
_SIZES = ("num_hidden_layers", *_HEADS, "max_position_embeddings", "vocab_size")


def adapt(model: Any, kernels: KernelChoice = "auto") -> Adapter:
    """Return the adapter of a loaded transformers causal language model, PEFT's wrapper or not; no weight is copied.

    Raises:
        UnsupportedModelError: the family, an option of its configuration, where or in what form its weights are, or
            what is on its modules or in their place is not supported.
        InputError: no such kernels.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.
    """
    base = causal_lm(model)
    family = family_of(base.config)
    check_weights(base)
    if not hasattr(base, "lm_head"):
        raise UnsupportedModelError(f"{type(base).__name__} has no language-model head (lm_head)")
    _check_shape(base.config)
    found, declared = len(base.get_submodule(family.layers)), base.config.num_hidden_layers
    if found != declared:
        raise UnsupportedModelError(
            f"{base.config.model_type}: the model has {found} layers, and its configuration says {declared}"
        )
    adapter = family.adapt(base)
    if adapter.spec.is_quantized:
        check_quantized_maps(base, family)
    resolved = resolve(kernels, adapter.spec)
    if resolved == "native" and isinstance(base.lm_head, AnyPrecisionLinear):
        by_kernels = partial(head, base.lm_head)
        adapter = replace(adapter, head=by_kernels, normed_head=partial(by_kernels, norm=adapter.final_norm))
    return replace(adapter, kernels=resolved, modules=ModuleWatch(model, resolved == "native"))


def _check_shape(config: Any) -> None:
    """Raise ModelError where a size is impossible; what is possible and odd is left to transformers."""
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(
            f"{config.model_type}: layers of several shapes (per_layer_config) are not supported"
        )
    for name in _SIZES:
        if (size := getattr(config, name, 1)) < 1:
            raise ModelError(f"{config.model_type}: {name} is {size}")
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if config.num_attention_heads % kv_heads:
        raise ModelError(
            f"{config.model_type}: {config.num_attention_heads} heads do not share {kv_heads} key/value heads evenly"
        )
