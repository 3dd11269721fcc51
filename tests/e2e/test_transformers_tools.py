"""What transformers' tools and evaluation harnesses ask of a model: facts, pipelines, streamers, `from_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.quantizers import AutoQuantizationConfig, auto

import quicksilver
from quicksilver.errors import UnsupportedFeatureError
from quicksilver.families.quantize import quantize_model
from quicksilver.loading.quantized import save_quantized
from quicksilver.weights.config import QUANT_METHOD, QuantizationConfig
from tests import HANGS, tiny
from tests.e2e.prompts import PROMPT


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized model and its tokenizer."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    save_quantized(tiny.quantized("llama"), folder, tiny.tokenizer())
    return folder


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_facts_are_those_of_the_wrapped_model(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    folder = tiny_model_dir(family)
    model = quicksilver.load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(model.name_or_path).vocab_size == tiny.tokenizer().vocab_size
    assert model.name_or_path == reference.name_or_path
    assert quicksilver.accelerate(tiny.model(family)).name_or_path == tiny.model(family).name_or_path
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == reference.num_parameters(**options)
    for buffers in (True, False):
        assert model.get_memory_footprint(buffers) == reference.get_memory_footprint(buffers)
    assert (model.device, model.dtype, model.can_generate()) == (reference.device, reference.dtype, True)
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.eval() is model


def test_quantized_weights_are_counted(quantized_dir: Path) -> None:
    plain, model = tiny.model("llama"), quicksilver.load(quantized_dir)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < plain.num_parameters()
    assert 0.2 < model.get_memory_footprint() / plain.get_memory_footprint() < 0.8
    assert model.name_or_path == str(quantized_dir)
    both = tiny.from_config(tiny.CONFIGS["qwen2"]())
    before = {exclude: both.num_parameters(exclude_embeddings=exclude) for exclude in (True, False)}
    quantize_model(both, QuantizationConfig())
    assert {each: quicksilver.accelerate(both).num_parameters(exclude_embeddings=each) for each in before} == before


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased", "llama"])
def test_tying_weights_changes_nothing(name: str) -> None:
    model = quicksilver.accelerate(tiny.from_config(tiny.config_of(name)))
    before = model(PROMPT).logits
    model.tie_weights()
    assert (model(PROMPT).logits == before).all()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_pipelines_generate(
    tiny_model_dir: Callable[[str], Path], quantized_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.pipelines.base.logger.error", lambda _: None)  # not one of its own models
    model = quicksilver.load(quantized_dir if kind == "quantized" else tiny_model_dir("llama"))
    tokenizer = copy.deepcopy(tiny.tokenizer())
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["The river", "Bends"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    tokenizer.padding_side = "left"
    assert [rows[0]["generated_text"] for rows in generate(prompts, batch_size=2, **options)] == alone


def test_an_iterating_streamer_gives_the_text(model: Any) -> None:
    tokenizer = tiny.tokenizer()
    expected = tokenizer.decode(model.generate(PROMPT, max_new_tokens=6)[0, PROMPT.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=HANGS)
    thread = Thread(target=model.generate, args=(PROMPT,), kwargs={"max_new_tokens": 6, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_transformers_knows_the_method_of_quantized_models(quantized_dir: Path) -> None:
    stored = quicksilver.load(quantized_dir).config.quantization_config
    assert AutoQuantizationConfig.from_dict(stored).to_dict() == stored
    assert AutoConfig.from_pretrained(quantized_dir).quantization_config == stored
    with pytest.raises(UnsupportedFeatureError, match=r"load the folder with quicksilver\.load"):
        AutoModelForCausalLM.from_pretrained(quantized_dir)


def test_without_us_transformers_finds_no_weights_rather_than_making_some_up(
    quantized_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, QUANT_METHOD, raising=False)
    with pytest.raises(OSError, match="load-with-quicksilver"):
        AutoModelForCausalLM.from_pretrained(quantized_dir)
