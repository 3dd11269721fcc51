"""Architectures of GGUF files: their configurations in transformers, and the names of their tensors there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.families.windows import FULL, SLIDING
from quicksilver.loading.gguf.metadata import Metadata
from quicksilver.loading.gguf.rotary import rope_parameters

_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GEMMA_GLOBAL = 6  # of so many layers the last sees the whole context, in all of Gemma 3
_GEMMA_27B = 62  # layers of the one size whose scores are scaled otherwise


@dataclass(frozen=True)
class Facts:
    """What of a file a configuration depends on, besides metadata."""

    vocab_size: int  # rows of the embedding
    has_head: bool  # whether there is a head of its own
    has_biases: Callable[[str], bool]  # whether any layer's maps that begin so ("attn_", "ffn_") have biases
    rope_factors: Tensor | None  # [head_dim / 2] what rotary frequencies are divided by


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is written in transformers."""

    config: Callable[[Metadata, Facts], Any]  # to transformers' configuration
    layers: str  # path of the layers
    names: Mapping[str, str]  # of modules outside of layers, GGUF's to transformers'
    layer_names: Mapping[str, str]  # of modules of a layer
    pairs_neighbours: bool = False  # rows of queries and keys are in the order that rotates neighbours
    norm_offset: float = 0.0  # what norms hold more than in transformers


def _sizes(m: Metadata, facts: Facts) -> dict[str, Any]:
    """Return what the configurations of Llama and what is like it have in common."""
    hidden_size, heads = m.whole("embedding_length"), m.whole("attention.head_count")
    head_dim = m.whole("attention.key_length", hidden_size // heads)
    if head_dim % 2:
        raise ModelError(f"heads of {head_dim} cannot be rotated")
    if facts.rope_factors is not None and 2 * len(facts.rope_factors) != head_dim:
        raise ModelError(f"rope_freqs.weight holds {len(facts.rope_factors)} factors for heads of {head_dim}")
    m.expect("attention.value_length", head_dim)
    m.expect("rope.dimension_count", head_dim)
    m.get("vocab_size")  # the embedding's rows are what counts
    return {
        "hidden_size": hidden_size,
        "intermediate_size": m.whole("feed_forward_length"),
        "num_hidden_layers": m.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": m.whole("context_length"),
        "vocab_size": facts.vocab_size,
        "tie_word_embeddings": not facts.has_head,
    }


def _llama(m: Metadata, facts: Facts) -> Any:
    from transformers import LlamaConfig

    m.get("tensor_data_layout")  # of files of 2023, and says what is so in all
    biases: dict[str, Any] = {"attention_bias": facts.has_biases("attn_"), "mlp_bias": facts.has_biases("ffn_")}
    return LlamaConfig(**_sizes(m, facts), **biases, rope_parameters=rope_parameters(m, 10000.0, facts.rope_factors))


def _qwen2(m: Metadata, facts: Facts) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_sizes(m, facts), rope_parameters=rope_parameters(m, None, facts.rope_factors))


def _qwen3(m: Metadata, facts: Facts) -> Any:
    from transformers import Qwen3Config

    rope = rope_parameters(m, None, facts.rope_factors)
    return Qwen3Config(**_sizes(m, facts), attention_bias=facts.has_biases("attn_"), rope_parameters=rope)


def _gemma3(m: Metadata, facts: Facts) -> Any:
    from transformers import Gemma3TextConfig

    sizes = _sizes(m, facts)
    layers, head_dim = sizes["num_hidden_layers"], sizes["head_dim"]
    window, softcap = m.get("attention.sliding_window"), m.get("final_logit_softcapping")
    scale_of = head_dim if layers != _GEMMA_27B else sizes["hidden_size"] // sizes["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": m.number("rope.freq_base_swa", 10000.0)}
    return Gemma3TextConfig(
        **sizes,
        attention_bias=facts.has_biases("attn_"),
        query_pre_attn_scalar=scale_of,
        sliding_window=m.whole("attention.sliding_window") if window else None,
        layer_types=_gemma_kinds(m, layers) if window else [FULL] * layers,
        final_logit_softcapping=None if softcap is None else m.number("final_logit_softcapping"),
        rope_parameters={FULL: rope_parameters(m, 10000.0, facts.rope_factors), SLIDING: local},
    )


def _gemma_kinds(m: Metadata, layers: int) -> list[str]:
    pattern = m.get("attention.sliding_window_pattern", _GEMMA_GLOBAL)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise ModelError(f"gemma3.attention.sliding_window_pattern names {len(pattern)} layers of {layers}")
        return [SLIDING if slides else FULL for slides in pattern]
    period = m.whole("attention.sliding_window_pattern", _GEMMA_GLOBAL)
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]


def _gpt2(m: Metadata, facts: Facts) -> Any:
    from transformers import GPT2Config

    heads = m.whole("attention.head_count")
    m.expect("attention.head_count_kv", heads)
    m.get("vocab_size")
    if facts.rope_factors is not None:
        raise UnsupportedModelError("rope_freqs.weight is not known in gpt2")
    return GPT2Config(
        n_embd=m.whole("embedding_length"),
        n_inner=m.whole("feed_forward_length"),
        n_layer=m.whole("block_count"),
        n_head=heads,
        n_positions=m.whole("context_length"),
        layer_norm_epsilon=m.number("attention.layer_norm_epsilon"),
        vocab_size=facts.vocab_size,
        tie_word_embeddings=not facts.has_head,
    )


ARCHITECTURES = {
    "llama": Architecture(_llama, "model.layers", _LLAMA_NAMES, _LLAMA_LAYER, pairs_neighbours=True),
    "qwen2": Architecture(_qwen2, "model.layers", _LLAMA_NAMES, _LLAMA_LAYER),
    "qwen3": Architecture(_qwen3, "model.layers", _LLAMA_NAMES, _LLAMA_LAYER),
    "gemma3": Architecture(
        _gemma3,
        "model.layers",
        _LLAMA_NAMES,
        {
            **_LLAMA_LAYER,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
    "gpt2": Architecture(
        _gpt2,
        "transformer.h",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}
"""Architectures that are read, by the names that GGUF has for them; `llama` is Mistral's too, and SmolLM2's."""


def read_config(m: Metadata, facts: Facts) -> Any:
    """Return transformers' configuration.

    Raises:
        UnsupportedModelError: the architecture, or a key that may change what it computes, is not supported.
        ModelError: a key is missing, or makes no sense.
    """
    for name in ("expert_count", "expert_used_count"):
        m.expect(name, 0)
    m.expect("attention.causal", True)
    config = ARCHITECTURES[m.architecture].config(m, facts)
    m.check_all_known()
    return config


def architecture_of(m: Metadata) -> Architecture:
    """Return the architecture of a file; UnsupportedModelError where it is not one of those that are read."""
    if m.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"architecture {m.architecture!r} is not supported in GGUF files; supported: {known}"
        )
    return ARCHITECTURES[m.architecture]
