"""What an engine is asked for, and the engines that run as PyTorch modules: Hugging Face's, and ours.

llama.cpp and CTranslate2 are in `llama_cpp_engine.py` and `ctranslate2_engine.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.tasks import Decode, Generate, Prefill, run

HUGGINGFACE, Q8, Q4, CT2 = "huggingface", "llama.cpp-q8_0", "llama.cpp-q4_0", "ctranslate2-int8"
PEERS = (HUGGINGFACE, Q8, Q4, CT2)


class Engine(Protocol):
    """A model loaded by an engine, batch 1, greedy; token ids go in, so no tokenizer is timed.

    Attributes:
        name: as in rows.
        baseline: name of the engine it is compared with.
        details: further facts for its rows.
        weight_bytes: bytes of weights that a decoded token reads.
    """

    name: str
    baseline: str
    details: dict[str, Any]
    weight_bytes: float

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Do what must be done once before it is measured, and fill in `details` and `weight_bytes`.

        Args:
            ids: tokens of a text.
            prompt: how many of them come before those that are decoded.
            prefill: how many of them are fed at once in the task of that name.
        """
        ...

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits [T, vocab] float32; the last `singly` tokens are fed one by one if it can."""
        ...

    def prefill(self, ids: Sequence[int]) -> None:
        """Feed a prompt at once, up to the logits of its last token."""
        ...

    def prefilled(self) -> np.ndarray:
        """Return the logits [1, vocab] float32 of the prompt's last token, as the last call of `prefill` made them."""
        ...

    def start(self, prompt: Sequence[int]) -> Any:
        """Feed a prompt; return what `decode` goes on from."""
        ...

    def decode(self, state: Any, ids: Sequence[int]) -> None:
        """Compute as many tokens as there are ids, one at a time, up to the logits of each."""
        ...

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return `count` new tokens after a prompt, whatever they are."""
        ...


@dataclass
class TorchEngine:
    """A model with transformers' interface; given tokens are fed, as in `benchmarks.engine`, in inference mode."""

    name: str
    baseline: str
    model: Any
    weight_bytes: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    _prefilled: torch.Tensor | None = field(default=None, init=False, repr=False)  # [1, 1, vocab]

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Nothing has to be done."""

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits, [T, vocab] float32."""
        fed = torch.tensor([ids])
        at_once = fed.shape[1] - singly
        output = self.model(fed[:, :at_once], use_cache=True)
        task = Decode(fed[:, at_once:], 0)
        parts = [output.logits[0], *(each[0] for each in task.calls(self.model, output.past_key_values))]
        return torch.cat(parts).float().numpy()

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> None:
        """Feed a prompt at once."""
        (self._prefilled,) = Prefill(torch.tensor([ids])).calls(self.model, None)

    @torch.inference_mode()
    def prefilled(self) -> np.ndarray:
        """Return what the last call of `prefill` gave, [1, vocab] float32."""
        assert self._prefilled is not None, "no prompt was fed"
        return self._prefilled[0].float().numpy()

    @torch.inference_mode()
    def start(self, prompt: Sequence[int]) -> Any:
        """Feed a prompt; return its cache."""
        return Decode(torch.tensor([prompt]), len(prompt)).prepare(self.model)

    @torch.inference_mode()
    def decode(self, state: Any, ids: Sequence[int]) -> None:
        """Feed the ids, one at a time."""
        run(Decode(torch.tensor([ids]), 0), self.model, state)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return what `generate`, as a user calls it, adds to a prompt."""
        (output,) = Generate(torch.tensor([prompt]), count).calls(self.model, None)
        return output[0, len(prompt) :].tolist()


def set_up_torch(threads: int) -> None:
    """Set how many threads PyTorch uses in this process, and have transformers say nothing."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


@torch.inference_mode()
def huggingface(floats: Path, baseline: str, threads: int) -> list[TorchEngine]:
    """Return the model as transformers runs it, in the dtype it is stored in.

    Args:
        floats: its folder.
        baseline: the engine it is compared with.
        threads: of this process.
    """
    from transformers import AutoModelForCausalLM

    set_up_torch(threads)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype="auto").eval()
    model.generation_config.eos_token_id = None  # generation never stops early
    dtype = str(model.dtype).removeprefix("torch.")
    details = {"dtype": dtype, "attention": model.config._attn_implementation}
    return [TorchEngine(HUGGINGFACE, baseline, model, _bytes_read(model), details)]


def _bytes_read(model: Any) -> int:
    """Return the bytes of all parameters but the tables of which a token reads a row."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows = [] if tied else [model.get_input_embeddings().weight]
    if model.config.model_type == "gpt2":
        rows.append(model.transformer.wpe.weight)
    return sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in rows)
