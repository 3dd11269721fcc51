"""Gemma 2: norms before and behind sublayers, every second layer with a window, bounded scores and logits."""

from operator import attrgetter
from typing import Any

import torch

from quicksilver.families.llama_like import LlamaLike, declare


def root_of_width(config: Any, dtype: torch.dtype) -> float:
    """Return the factor of embeddings, as a number of their dtype."""
    return float(torch.tensor(config.hidden_size**0.5, dtype=dtype))


FAMILY = declare(
    LlamaLike(
        "Gemma2",
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        windows="by kind",
        softcap=attrgetter("attn_logit_softcapping"),
        embedding_scale=root_of_width,
        logits_softcap=attrgetter("final_logit_softcapping"),
        refused=("use_bidirectional_attention",),
    )
)
