"""The models that come with the package: plain transformers models, small, deep, and the same under both libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import quicksilver
from quicksilver.core.sources import embedded_models, resolve_model
from tests import tolerances

MODELS = {"ref-llama": ("llama", 12), "ref-gpt2": ("gpt2", 10)}  # family, least layers
TEXT = "The river rises in the mountains of the north, and for most of its course it forms the border."


def test_both_are_there_and_small() -> None:
    assert set(embedded_models()) == set(MODELS)
    files = [Path(resolve_model(name)) / "model.safetensors" for name in MODELS]
    assert sum(file.stat().st_size for file in files) <= 40e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"BF16", "F16"}


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_gives_the_same_logits(name: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    family, layers = MODELS[name]
    assert reference.config.model_type == family
    assert reference.config.num_hidden_layers >= layers
    assert reference.config.max_position_embeddings == 1024
    assert reference.config.tie_word_embeddings
    ids = quicksilver.load_tokenizer(name)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(
        quicksilver.load(name)(ids).logits, expected, atol=tolerances.LOGITS[torch.float32], rtol=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_they_know_some_english(name: str) -> None:
    """Far below the 9.01 nats of a uniform guess over 8,192 tokens."""
    ids = quicksilver.load_tokenizer(name)(TEXT, return_tensors="pt").input_ids
    assert quicksilver.load(name)(ids, labels=ids).loss < 5.0
