"""Gemma 2: norms before and behind sublayers, every second layer with a window, bounded scores and logits."""

from operator import attrgetter
from typing import Any

import torch

from quicksilver.families.llama_like import LlamaLike, declare


def _embedding_scale(config: Any, dtype: torch.dtype) -> float | None:
    """Return the root of the width as a number of the dtype; None where the embedding's own module multiplies by it."""
    from transformers.models.gemma2 import modeling_gemma2

    by_module = hasattr(modeling_gemma2, "Gemma2TextScaledWordEmbedding")  # not so in transformers 5.0
    return None if by_module else float(torch.tensor(config.hidden_size**0.5, dtype=dtype))


FAMILY = declare(
    LlamaLike(
        "Gemma2",
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        windows="by kind",
        softcap=attrgetter("attn_logit_softcapping"),
        embedding_scale=_embedding_scale,
        logits_softcap=attrgetter("final_logit_softcapping"),
        refused=("use_bidirectional_attention",),
    )
)
