"""Rotary frequencies of GGUF files in transformers' words."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.loading.gguf.metadata import Metadata

_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
_YARN_OPTIONS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}


def rope_parameters(m: Metadata, base: float | None, factors: Tensor | None) -> dict[str, Any]:
    """Return `rope_parameters` of a configuration.

    Args:
        m: the file's metadata.
        base: of frequencies where the file does not say, None where it must.
        factors: [head_dim / 2] what frequencies are divided by, as in Llama 3.1, or None.

    Raises:
        UnsupportedModelError: the scaling is of a kind that is not supported.
        ModelError: a number of it is missing, or makes no sense.
    """
    if base is None and m.get("rope.freq_base") is None:
        raise ModelError(f"{m.architecture}.rope.freq_base is missing, and models of this kind differ in it")
    theta = {"rope_theta": m.number("rope.freq_base", base)}
    scale = next((key for key in _FACTORS if m.get(key) is not None), _FACTORS[0])
    kind = m.get("rope.scaling.type", "none" if m.get(scale) is None else "linear")
    m.get("rope.scaling.finetuned")
    if factors is not None:
        if kind != "none":
            raise UnsupportedModelError(f"rope_freqs.weight beside {m.architecture}.rope.scaling.type is not supported")
        return theta | _divided(m, factors)
    if kind == "none":
        return {"rope_type": "default", **theta}
    if kind == "linear":
        m.expect("rope.scaling.attn_factor", 1.0)
        m.get("rope.scaling.original_context_length")
        return {"rope_type": "linear", "factor": m.number(scale), **theta}
    if kind == "yarn":
        return theta | _yarn(m, m.number(scale))
    raise UnsupportedModelError(f"{m.architecture}.rope.scaling.type = {kind!r} is not supported")


def _yarn(m: Metadata, factor: float) -> dict[str, Any]:
    """Return YaRN as llama.cpp computes it, whose factor of attention is another on top of the usual one."""
    m.expect("rope.scaling.yarn_ext_factor", 1.0)
    attention = m.number("rope.scaling.attn_factor", m.get("rope.scaling.yarn_attn_factor", 1.0))
    options = {ours: m.number(theirs) for theirs, ours in _YARN_OPTIONS.items() if m.get(theirs) is not None}
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": m.whole("rope.scaling.original_context_length", m.whole("context_length")),
        "attention_factor": attention * usual,
        **options,
    }


def _divided(m: Metadata, factors: Tensor) -> dict[str, Any]:
    """Return what divides each frequency by its factor, at any length: long factors that are the short ones."""
    values = factors.tolist()
    if not all(0 < value < math.inf for value in values):
        raise ModelError("rope_freqs.weight holds factors that are not above 0")
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": m.whole("context_length"),
    }
