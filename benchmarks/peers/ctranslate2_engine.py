"""CTranslate2: how a model is converted for it, and how its generator is asked for one thing at a time.

Its generator takes prompts and gives tokens. A prompt that is not to be timed is given as its static prompt, whose
keys and values it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def convert(folder: Path, target: Path) -> None:
    """Convert a model to int8 with CTranslate2's own converter; its tokens are called by their ids.

    Args:
        folder: the model as transformers reads it.
        target: folder to write.
    """
    import torch
    from ctranslate2.converters import TransformersConverter

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return model_class.from_pretrained(model_name_or_path, **{**kwargs, "dtype": torch.float32})

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return _Ids(config["vocab_size"])

        def _load(self) -> Any:  # what converters are made by overriding
            spec = super()._load()
            for layer in spec.decoder.layer if "head_dim" in config else ():  # its Llama loader takes hidden / heads
                vars(layer.self_attention)["head_dim"] = np.dtype("int32").type(config["head_dim"])
            return spec

    Converter(str(folder)).convert(str(target), quantization="int8")


class _Ids:
    """A tokenizer that knows tokens by their ids alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.bos_token = self.eos_token = self.unk_token = str(size - 1)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._size)}


class CTranslate2:
    """A converted model; int8 weights and activations in the products, float32 elsewhere.

    Args:
        name: as in rows.
        baseline: the engine it is compared with.
        folder: what `convert` wrote.
        floats: folder of the float model, for its sizes.
        threads: of the one generation that runs.
    """

    def __init__(self, name: str, baseline: str, folder: Path, floats: Path, threads: int) -> None:
        import ctranslate2

        self.name, self.baseline = name, baseline
        self._generator = ctranslate2.Generator(
            str(folder), compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self.weight_bytes = float((folder / "model.bin").stat().st_size - _row_bytes(floats))
        self._prompt: Sequence[int] = ()  # that `prefill` fed last
        self.details: dict[str, Any] = {"compute_type": self._generator.compute_type}

    def tune(self, ids: Sequence[int], prompt: int, prefill: int) -> None:
        """Nothing has to be done."""

    def logits(self, ids: Sequence[int], singly: int) -> np.ndarray:
        """Return every token's logits, [T, vocab] float32, all from one pass: it has no other way to give them."""
        return np.array(self._generator.forward_batch([list(ids)]))[0].astype(np.float32)

    def prefill(self, ids: Sequence[int]) -> None:
        """Generate one token after a prompt: the first so many forward at once, the last as a step."""
        self._prompt = ids
        self._generate(_tokens(ids), 1)

    def prefilled(self) -> np.ndarray:
        """Return the logits of that token, [1, vocab] float32: the generator keeps none, so it generates once more.

        A least length would take the end of the text out of the logits; the greatest, which stays, makes it one token.
        """
        (result,) = self._run(_tokens(self._prompt), max_length=1, return_logits_vocab=True)
        return np.array(result.logits, dtype=np.float32)[0]

    def start(self, prompt: Sequence[int]) -> list[str]:
        """Have the state after a prompt kept; return the prompt, by which it is found again."""
        kept = _tokens(prompt)
        self._generate([str(prompt[0])], 1, kept)
        return kept

    def decode(self, state: list[str], ids: Sequence[int]) -> None:
        """Feed the first id after the prompt and generate greedily from there, as many steps as there are ids."""
        self._generate([str(ids[0])], len(ids), state)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return what its generator adds to a prompt."""
        return self._generate(_tokens(prompt), count)

    def _generate(self, start: list[str], count: int, static_prompt: list[str] | None = None) -> list[int]:
        (result,) = self._run(
            start, max_length=count, min_length=count, static_prompt=static_prompt, cache_static_prompt=True
        )
        return result.sequences_ids[0]

    def _run(self, start: list[str], **options: Any) -> Any:
        """Generate greedily; what comes before the last start token is fed at once."""
        return self._generator.generate_batch([start], include_prompt_in_result=False, sampling_topk=1, **options)


def load(name: str, baseline: str, folder: Path, floats: Path, threads: int) -> list[CTranslate2]:
    """Return the one engine there is, made of the same arguments."""
    return [CTranslate2(name, baseline, folder, floats, threads)]


def _tokens(ids: Sequence[int]) -> list[str]:
    return [str(token) for token in ids]


def _row_bytes(floats: Path) -> int:
    """Return the bytes, as converted, of the tables of which a token reads a row."""
    config = json.loads((floats / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "gpt2":
        return 4 * config["n_positions"] * config["n_embd"]  # float32; the tied token table is the head
    if config.get("tie_word_embeddings"):
        return 0
    return config["vocab_size"] * (config["hidden_size"] + 4)  # a scale for each row
