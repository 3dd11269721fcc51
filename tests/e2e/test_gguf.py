"""A GGUF file stands where a model's folder does: in Python, on the command line, in the harness."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import quicksilver
from quicksilver.errors import ModelError, TokenizerWarning
from tests import gguf_files, tiny, tolerances
from tests.e2e.conftest import Outcome
from tests.gguf_files import CONTROL, bpe, describe, random_blocks, stored, write
from tests.packing import weights_of

STOP = "<|im_end|>"


def make(path: Path, pre: str = "smollm", *, quantized: bool = False, **keys: Any) -> Path:
    """Write a tiny Llama with a tokenizer, its maps in floats or in codes."""
    first = len(gguf_files.trained_bpe()[0])
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=first + 1,
        max_position_embeddings=128,
    )
    tensors = stored(tiny.from_config(config))
    for name, (array, _) in tensors.items():
        if quantized and name.startswith("blk") and array.ndim == 2:
            tensors[name] = (random_blocks("Q4_1", array.shape[0], array.shape[1] // 32), "Q4_1")
    vocabulary = bpe(pre, {STOP: CONTROL}, eos_token_id=first, **keys)
    return write(path, {**describe(config), **vocabulary}, tensors)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make(tmp_path / "tiny.gguf")


@pytest.fixture
def quantized_file(tmp_path: Path) -> Path:
    return make(tmp_path / "tiny-q4_1.gguf", quantized=True)


def test_the_command_line_takes_a_file(cli: Callable[..., Outcome], quantized_file: Path, text_file: Path) -> None:
    outcome = cli("generate", quantized_file, "The river", "--max-new-tokens", 4)
    assert outcome.status == 0
    outcome = cli("eval", quantized_file, "--text", text_file, "--context", 32, "--max-tokens", 64)
    assert outcome.status == 0
    assert quantized_file.name in outcome.out
    assert str(quantized_file.parent) not in outcome.out


@pytest.mark.parametrize("place", ["", "tiny.gguf"])
def test_a_folder_of_one_file_is_that_file(file: Path, place: str) -> None:
    model = quicksilver.load(file.parent / place)
    ids = quicksilver.load_tokenizer(file.parent / place)("The river", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert output.shape[1] <= ids.shape[1] + 4
    assert model.model.config.name_or_path == str(file)


def test_a_file_of_another_name_is_known_by_its_beginning(file: Path) -> None:
    blob = file.rename(file.with_name("sha256-0123abcd"))
    assert quicksilver.load(blob).config.num_hidden_layers == 2


def test_the_type_of_the_weights_may_be_chosen(file: Path) -> None:
    whole, half = quicksilver.load(file), quicksilver.load(file, dtype="bfloat16")
    assert (whole.model.dtype, half.model.dtype) == (torch.float32, torch.bfloat16)
    ids = torch.tensor([[3, 4, 5]])
    difference = (whole(ids).logits - half(ids).logits.float()).abs().max() / whole(ids).logits.abs().max()
    assert float(difference) < tolerances.LOGITS[torch.bfloat16]


def test_plans_run_on_a_file(file: Path) -> None:
    for plan in ("settled", "uniform-8bit"):
        model = quicksilver.load(file, plan=plan)
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)


def test_quantizing_rounds_floats_and_takes_codes_over(
    cli: Callable[..., Outcome], file: Path, quantized_file: Path, tmp_path: Path
) -> None:
    outcome = cli("quantize", file, "-o", tmp_path / "made")
    assert outcome.status == 0, outcome.err
    prompt = torch.tensor([[3, 4, 5]])
    assert quicksilver.load(tmp_path / "made")(prompt).logits.shape == (1, 3, file_rows(file))
    tokenizer = quicksilver.load_tokenizer(tmp_path / "made")
    assert tokenizer("a  1").input_ids == quicksilver.load_tokenizer(file)("a  1").input_ids
    outcome = cli("quantize", quantized_file, "-o", tmp_path / "taken")
    assert outcome.status == 0, outcome.err
    wanted = weights_of(quicksilver.load(quantized_file).model)
    found = weights_of(quicksilver.load(tmp_path / "taken").model)
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def file_rows(file: Path) -> int:
    return quicksilver.load(file).config.vocab_size


def test_a_file_without_a_tokenizer_runs_and_says_so_when_asked(
    refused: Callable[..., str], file: Path, tmp_path: Path
) -> None:
    model = tiny.from_config(quicksilver.load(file).config)
    bare = write(tmp_path / "bare.gguf", describe(model.config), stored(model))
    assert quicksilver.load(bare)(torch.tensor([[3, 4]])).logits.shape[1] == 2
    refused("generate", bare, "x", names=(bare, "there is no tokenizer in this file"))


def test_an_unknown_split_stops_texts_and_not_ids(file: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "new.gguf", pre="of-tomorrow")
    assert quicksilver.load(path)(torch.tensor([[3, 4]])).logits.shape[1] == 2
    with pytest.raises(ModelError, match=r"new\.gguf: tokenizer\.ggml\.pre = 'of-tomorrow' is not known"):
        quicksilver.load_tokenizer(path)


def test_notes_of_a_tokenizer_are_said_once(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = make(tmp_path / "odd.gguf", padding_token_id=99_999)
    outcome = cli("generate", path, "The river", "--max-new-tokens", 2)
    assert outcome.status == 0
    assert [line for line in outcome.said if "padding_token_id" in line] == outcome.said
    assert len(outcome.said) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quicksilver.load_tokenizer(path)
    assert [warning.category for warning in caught] == [TokenizerWarning]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.gguf", b"", "the file is empty"),
        ("model.gguf", b"GGUF" + bytes(4), "version 0"),
        ("model.gguf", b"PK\x03\x04" + bytes(90), "not a GGUF file"),
        ("model.bin", b"PK\x03\x04" + bytes(90), "it is a file, and folders with"),
    ],
)
def test_bad_files_are_refused_in_a_line(
    refused: Callable[..., str], tmp_path: Path, text_file: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / name
    path.write_bytes(content)
    refused("eval", path, "--text", text_file, names=(path, reason))
    refused("generate", path, "x", names=(path, reason))


def test_weights_that_are_not_finite_are_refused_by_name(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tiny.model("llama")
    tensors = stored(model)
    tensors["blk.1.ffn_up.weight"] = (np.full_like(tensors["blk.1.ffn_up.weight"][0], np.nan), "F32")
    path = write(tmp_path / "bad.gguf", {**describe(model.config)}, tensors)
    refused("generate", path, "x", names=(path, "blk.1.ffn_up.weight holds weights that are NaN or infinite"))


def test_the_harness_takes_a_file(file: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from quicksilver.integrations.lm_eval import QuickSilverLM

    harness = QuickSilverLM(pretrained=str(file), batch_size=1)
    assert harness.tok_encode("a  1") == quicksilver.load_tokenizer(file)("a  1").input_ids
