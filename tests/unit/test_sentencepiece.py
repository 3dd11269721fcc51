"""A `tokenizer.model` gives sentencepiece's own ids, without sentencepiece; what cannot be read says what it is."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import quicksilver
from quicksilver.errors import ModelError
from quicksilver.measure.demo import ARTICLES
from quicksilver.measure.windows import default_bos

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece, which makes the files, is not installed")

KINDS: dict[str, dict[str, Any]] = {
    "bpe, as of Llama 2": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "bpe, normalized": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram, normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "bpe without a prefix": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe without bytes": {"model_type": "bpe", "byte_fallback": False},
    "unigram without bytes": {"byte_fallback": False},
    "bpe with symbols": {"model_type": "bpe", "user_defined_symbols": ["<u>", "\n\n", "  ", "river"]},
    "unigram with symbols": {"user_defined_symbols": ["<u>", "\n\n", "river"]},
    "bpe across words": {"model_type": "bpe", "split_by_whitespace": False},
}
TEXTS = (
    "The river rises in the Black Forest.", " leading", "  two", "a  b   c ", "line\nbreak\n\nx\r\n", "\n", "tab\there",
    "日本 🙂 naïve", "▁under ▁", "3.14159", "\u200b zero", "\ufeffbom", "", " ", "     ", "aaaaaaa",
    "<0x0A> <u>", "\uff21\uff22\u3000y",
)  # fmt: skip


@cache
def trained(kind: str) -> bytes:
    """Return the file of a model trained on the package's articles."""
    lines = [line for path in sorted(ARTICLES.glob("*.txt")) for line in path.read_text("utf-8").split("\n") if line]
    options = {
        "model_type": "unigram",
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "character_coverage": 0.99,
        "max_sentence_length": 10_000,
        "num_threads": 1,
        "minloglevel": 2,
        **KINDS.get(kind, {}),
    }
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines[:60]), model_writer=file, **options)
    return file.getvalue()


@pytest.fixture
def write(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a model's folder with a tokenizer.model and nothing else of a tokenizer."""

    def make(content: bytes, name: str = "tokenizer.model", family: str = "llama", **config: Any) -> Path:
        folder = Path(shutil.copytree(tiny_model_dir(family), tmp_path / "model"))
        for path in folder.glob("*token*"):
            path.unlink()
        (folder / name).write_bytes(content)
        if config:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    for package in ("sentencepiece", "google", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)  # none of them is needed
    ours = quicksilver.load_tokenizer(write(trained(kind)))
    rng = random.Random(0)
    words = ("the", "The", "", "ing", "river", "\n", "é日", "▁", "<u", "9.5", "a\tb", "aa")
    drawn = [rng.choice((" ", "")).join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(150)]
    ours.save_pretrained(tmp_path / "saved")
    again = quicksilver.load_tokenizer(write_config(tmp_path / "saved"))
    for text in (*TEXTS, *drawn, (ARTICLES / "14-potato.txt").read_text("utf-8")):
        assert ours(text, add_special_tokens=False).input_ids == theirs.encode(text), repr(text)
        assert ours(text).input_ids == again(text).input_ids == [1, *theirs.encode(text)]


def write_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_special_tokens_are_as_of_llama(write: Callable[..., Path]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained("bpe, as of Llama 2"))
    tokenizer = quicksilver.load_tokenizer(write(trained("bpe, as of Llama 2")))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert default_bos(tokenizer) == 1
    assert tokenizer("x<s> y</s>").input_ids == [1, *theirs.encode("x"), 1, *theirs.encode(" y"), 2]
    text = "  Two lines\nand 日本 🙂  "
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    encoded = tokenizer("naïve 日", add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.offset_mapping[-1] == (6, 7)


def test_a_tokenizer_config_beside_it_counts(write: Callable[..., Path]) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True, "pad_token": "</s>"}
    tokenizer = quicksilver.load_tokenizer(write(trained("unigram"), **config, chat_template="{{ 'x' }}"))
    ids = tokenizer("a").input_ids
    assert (ids[0] != 1, ids[-1]) == (True, 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.chat_template == "{{ 'x' }}"


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_other_classes_name_the_packages_they_need(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = write(trained("bpe, as of Llama 2"), tokenizer_class="CodeLlamaTokenizer")
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"transformers.utils.import_utils.is_{name}_available", lambda there=name != package: there)
    with pytest.raises(ModelError, match=rf"a CodeLlamaTokenizer .* {package} is not installed: pip install"):
        quicksilver.load_tokenizer(folder)


TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_tiktoken_is_named(write: Callable[..., Path], name: str) -> None:
    folder = write(TIKTOKEN, name)
    with pytest.raises(ModelError, match=rf"{name}: a tiktoken vocabulary.*put the tokenizer\.json"):
        quicksilver.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"", "it holds no tokens"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: b"PK\x03\x04" + data, "not a sentencepiece model"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "not a sentencepiece model"),
        (lambda data: bytes(range(256)), "not a sentencepiece model"),
    ],
    ids=["empty", "cut off", "zip", "LFS pointer", "garbage"],
)
def test_a_damaged_file_is_named(write: Callable[..., Path], spoil: Callable[[bytes], bytes], reason: str) -> None:
    folder = write(spoil(trained("unigram")))
    with pytest.raises(ModelError, match=rf"tokenizer\.model: .*{reason}"):
        quicksilver.load_tokenizer(folder)
