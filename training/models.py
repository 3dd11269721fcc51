"""The models trained here: transformers' own Llama and GPT-2, from the `[model]` table of a configuration.

Nothing here changes an architecture; training and export live elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from training.common import InputError

ARCHITECTURES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


def build_model(architecture: str, table: dict[str, Any], vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """Build a freshly initialised float32 model; `table` holds the transformers configuration's own keys."""
    config_class, model_class = ARCHITECTURES[architecture]
    # No pad_token_id: with one, transformers would keep that row of the embedding from learning.
    ids = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    try:
        model = model_class(config_class(vocab_size=vocab_size, use_cache=False, **ids, **table))
    except (TypeError, ValueError) as error:
        raise InputError(f"[model]: {error}") from error
    return model.float()


def scale_residual_outputs(model: nn.Module) -> None:
    """Start the layers' output maps at zero, so that each layer begins as the identity."""
    endings = ("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(endings):
                module.weight.zero_()


def max_positions(model: PreTrainedModel) -> int:
    """Return the longest context the model takes, in tokens."""
    return int(model.config.max_position_embeddings)
