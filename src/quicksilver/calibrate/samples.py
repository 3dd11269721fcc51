"""Text to calibrate on where the user has none: drawn from the model itself."""

import torch
from torch import Tensor

from quicksilver.model import QuickSilverForCausalLM

_LENGTH = 256


def sample_windows(model: QuickSilverForCausalLM, num_tokens: int, seed: int = 0) -> list[Tensor]:
    """Return sequences that the model says, [T] token ids each, at least so many tokens, at temperature 1."""
    length = min(_LENGTH, model.adapter.spec.max_positions)
    count = -(-num_tokens // length)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        bos_id = model.generation_config.bos_token_id
        shape, vocab_size = (count, 1), model.adapter.spec.vocab_size
        starts = torch.full(shape, bos_id) if isinstance(bos_id, int) else torch.randint(vocab_size, shape)
        sampled = model.generate(
            starts.to(model.device),
            attention_mask=torch.ones_like(starts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=0,
        )
    return list(sampled.cpu())
