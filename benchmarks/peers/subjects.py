"""The models that engines are compared on: two shapes with random weights, and any folder with its own.

What is made of them for each engine is `files.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quicksilver.core.sources import EMBEDDED, resolve_model

SEED = 0
SHAPES = ("gpt2", "llama1b")
_DEMO_TEXTS = EMBEDDED.parent / "demo"
_GPT2: dict[str, Any] = {"n_positions": 1024}
_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_QUICK_GPT2: dict[str, Any] = {"n_embd": 128, "n_head": 4, "n_layer": 4, "vocab_size": 1000, "n_positions": 1024}
_QUICK_LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Subject:
    """A model, by where its files are.

    Attributes:
        name: a shape's, an embedded model's or a folder's, as in rows.
        cache: folder for all that is made of it.
        floats: folder of its float weights, as transformers reads them; made if `is_random`.
        is_random: weights from a fixed seed.
        quick: a very small model of that shape.
    """

    name: str
    cache: Path
    floats: Path
    is_random: bool
    quick: bool = False

    @classmethod
    def of(cls, name: str, work: Path, quick: bool) -> Subject:
        """Return the subject of a shape's name, an embedded model's, or a folder.

        Raises:
            ModelError: it is none of these.
        """
        if name in SHAPES:
            cache = work / (f"{name}-quick" if quick else name)
            return cls(name, cache, cache / "float", True, quick)
        folder = Path(resolve_model(name))
        files = sorted(folder.glob("*.safetensors"))
        stamp = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        digest = hashlib.sha256(f"{folder.resolve()} {stamp}".encode()).hexdigest()[:8]
        short = folder.name
        return cls(short, work / f"{short}-{digest}", folder, False)

    def token_ids(self, count: int, text: str | None = None) -> list[int]:
        """Return the ids of `count` tokens, always the same: of a text, or random ones that are not special.

        Args:
            count: how many.
            text: for a model with a tokenizer (default: the demo's texts).

        Raises:
            ValueError: the text is too short.
        """
        if self.is_random:
            generator = torch.Generator().manual_seed(SEED)
            vocab_size = config_of(self.name, self.quick).vocab_size
            return torch.randint(3, vocab_size - 1, (count,), generator=generator).tolist()
        return text_ids(self.floats, count, text)

    def describe(self) -> dict[str, Any]:
        """Return what a reader must know of the model."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.floats)
        return {
            "name": self.name,
            "family": config.model_type,
            "weights": f"random, seed {SEED}" if self.is_random else "the model's own",
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            "positions": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "tied": config.tie_word_embeddings,
            "dtype": str(config.dtype).removeprefix("torch."),
        }


def text_ids(model: Path, count: int, text: str | None = None) -> list[int]:
    """Return the ids of a text's first `count` tokens, the demo's texts by default; ValueError where it is too short.

    Args:
        model: a folder, or a GGUF file.
        count: how many.
        text: what is cut.
    """
    from quicksilver.loading.load import load_tokenizer

    if text is None:
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(_DEMO_TEXTS.glob("*.txt")))
    ids = load_tokenizer(str(model))(text).input_ids
    if len(ids) < count:
        raise ValueError(f"the text holds {len(ids)} tokens, {count} are needed")
    return ids[:count]


def config_of(shape: str, quick: bool) -> Any:
    """Return the configuration of a shape."""
    from transformers import GPT2Config, LlamaConfig

    if shape == "gpt2":
        special = {"bos_token_id": 0, "eos_token_id": 0} if quick else {}
        return GPT2Config(**(_QUICK_GPT2 if quick else _GPT2), **special, dtype=torch.float32)
    return LlamaConfig(**(_QUICK_LLAMA if quick else _LLAMA_1B), dtype=torch.bfloat16)


def write_random(shape: str, quick: bool, folder: Path) -> None:
    """Write a model of a shape, its weights random and always the same, in its configuration's dtype."""
    from transformers import AutoModelForCausalLM

    config = config_of(shape, quick)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)


def random_windows(vocab_size: int, count: int, length: int) -> Sequence[torch.Tensor]:
    """Return windows [T] of random tokens to fit thresholds to; not those that anything is measured on."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return list(torch.randint(3, vocab_size - 1, (count, length), generator=generator))
