"""Granite: Llama with factors of embeddings, of what sublayers add, of scores and of logits."""

from operator import attrgetter
from typing import Any

import torch

from quicksilver.families.llama_like import LlamaLike, declare


def _embedding_scale(config: Any, dtype: torch.dtype) -> float:
    return config.embedding_multiplier


FAMILY = declare(
    LlamaLike(
        "Granite",
        residual_scale=attrgetter("residual_multiplier"),
        embedding_scale=_embedding_scale,
        logits_divisor=attrgetter("logits_scaling"),
    )
)
