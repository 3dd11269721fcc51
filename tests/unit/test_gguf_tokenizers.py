"""Tokenizers of GGUF files give the trained model's ids, stop where it stops, and render its chats."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LogitsProcessor, LogitsProcessorList

import quicksilver
from quicksilver.errors import ModelError, TokenizerWarning, UnsupportedModelError
from quicksilver.loading.gguf.model import GgufModel
from quicksilver.loading.gguf.splits import SPLITS
from tests import gguf_files, tiny
from tests.gguf_files import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, bpe, spm, tokenizer_of, vocabulary_only

TEXTS = (
    "", " ", "   ", "\n", "\n\n\n\n1", "hi", " hi", "  hi", "a  1", "a   12", "a  b", "\t\t1", "tabs\t\tand  spaces   ",
    "x \n y\n\n", "a\r\nb\r\n\r\nc", "DON'T stop, you'll see", "I'm WE'LL he's 'S", "don\u2019t",
    "3.14159 1234567 12 345", "A1B2 v2.0", "word1word2  33", "price $5 + tax=3^2~|x|", "foo_bar(baz=1)[0] == {'x': 2}",
    "http://x.y/z?q=1&r=2", "__init__", "CamelCase HTMLParser", "x² y³ ½ Ⅷ", "हिन्दी १२३ ४", "naïve café Ünïcödé",
    "日本語テキスト", "Việt Nam", "\u3000wide a\u00a0b",
    "👩\u200d👩\u200d👧 fam 👨🏽\u200d💻", "🙂🙂", "ǅ ʰ", "\u017f'\u017f",
    "a\x04b", "\U00050000", "thunderstorm brutalist architecture", "<0x0A>",
)  # fmt: skip


def llama_ids(path: Path, texts: Any) -> list[list[int]]:
    """Return llama.cpp's ids; skip the test where it is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [theirs.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    finally:
        theirs.close()


def pieces(tokenizer: Any, text: str) -> list[str]:
    """Return what a text is split into before merges."""
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [tokenizer.backend_tokenizer.decoder.decode([part]) for part, _ in parts]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a  1", ["a", "  ", "1"]),  # digits first: the spaces are then at the end of their piece
        ("gpt-2", "a  1", ["a", " ", " 1"]),
        ("qwen2", "a  1", ["a", " ", " ", "1"]),
        ("smollm", "\t\t1", ["\t\t", "1"]),
        ("smollm", "a   12", ["a", "   ", "1", "2"]),
        ("gpt-2", "x123 DON'T you'll", ["x", "123", " DON", "'", "T", " you", "'ll"]),
        ("qwen2", "x123 DON'T you'll", ["x", "1", "2", "3", " DON", "'T", " you", "'ll"]),
        ("llama-bpe", "x12345 DON'T", ["x", "123", "45", " DON", "'T"]),
        ("llama3", "12345", ["123", "45"]),
        ("llama-v3", "12345", ["123", "45"]),
        ("tekken", "HTMLParser x12//", ["HTMLParser", " x", "1", "2", "//"]),
        ("tekken", "camelCase don't", ["camel", "Case", " don", "'t"]),
        ("llama-bpe", "camelCase", ["camelCase"]),
        ("default", "x12345!?", ["x", "123", "45", "!?"]),
        ("default", "a $5", ["a", " ", "$", "5"]),
    ],
)
def test_texts_are_split_as_the_name_says(tmp_path: Path, pre: str, text: str, expected: list[str]) -> None:
    assert pieces(tokenizer_of(tmp_path, bpe(pre)), text) == expected


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_of_bytes_are_those_of_llama_cpp(tmp_path: Path, pre: str) -> None:
    added = {"<s>": CONTROL, "<tool>": USER_DEFINED, "[PAD1]": UNUSED, "  \t": USER_DEFINED, "<tool>>": USER_DEFINED}
    vocabulary = bpe(pre, added, bos_token_id=len(gguf_files.trained_bpe()[0]))
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    texts = [*TEXTS, "x<tool>y <s>z", "<tool>>", "[PAD1]", "a  \tb"]
    assert [tokenizer(text).input_ids for text in texts] == llama_ids(tmp_path / "model.gguf", texts)


def test_a_name_that_is_not_known_is_refused_and_a_missing_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.gguf: tokenizer\.ggml\.pre = 'dolly' is not known"):
        tokenizer_of(tmp_path, bpe("dolly"))
    with pytest.warns(TokenizerWarning, match=r"tokenizer\.ggml\.pre is missing"):
        tokenizer = tokenizer_of(tmp_path, bpe(None))
    assert pieces(tokenizer, "x12345!?") == ["x", "123", "45", "!?"]


def test_composed_letters_are_one_where_the_trained_model_composes_them(tmp_path: Path) -> None:
    apart, composed = "cafe\u0301", "caf\u00e9"
    for pre, same in (("qwen2", True), ("llama-bpe", False), ("gpt-2", False)):
        tokenizer = tokenizer_of(tmp_path, bpe(pre))
        assert (tokenizer(apart).input_ids == tokenizer(composed).input_ids) == same


def test_a_piece_that_is_a_token_is_not_merged_where_the_model_looks_it_up(tmp_path: Path) -> None:
    whole = {"Zzyzx": NORMAL}  # no merges make it
    for pre, found in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        tokenizer = tokenizer_of(tmp_path, bpe(pre, whole, add_bos_token=False))
        assert (tokenizer("Zzyzx").input_ids == [len(gguf_files.trained_bpe()[0])]) == found


def test_a_merge_may_begin_with_a_space_and_bytes_without_a_token_are_left_out(tmp_path: Path) -> None:
    vocabulary = bpe("gpt-2")
    tokens: list[str] = vocabulary["tokenizer.ggml.tokens"]
    gone = tokens.index("\u0104")  # byte 4, as the alphabet writes it
    for name in ("tokens", "token_type"):
        del vocabulary[f"tokenizer.ggml.{name}"][gone]
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    assert tokenizer("a\x04b").input_ids == [tokens.index(each) - (tokens.index(each) > gone) for each in "ab"]
    vocabulary = bpe("gpt-2", {"  x": NORMAL})
    vocabulary["tokenizer.ggml.merges"].append("   x")
    tokenizer_of(tmp_path, vocabulary)


def test_kinds_of_tokens_say_what_is_matched_and_what_is_shown(tmp_path: Path) -> None:
    added = {"<|end|>": CONTROL, "<think>": USER_DEFINED, "<think>>": USER_DEFINED, "[PAD7]": UNUSED}
    first = len(gguf_files.trained_bpe()[0])
    tokenizer = tokenizer_of(tmp_path, bpe("qwen2", added))
    assert tokenizer("<think>x").input_ids[0] == first + 1
    assert tokenizer("<think>>").input_ids == [first + 2]  # the longest
    assert tokenizer("<think>x", split_special_tokens=True).input_ids[0] == first + 1
    assert tokenizer("<|end|>").input_ids == [first]
    assert first + 3 not in tokenizer("a [PAD7][PAD7]").input_ids
    ids = [first, first + 1, first + 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"
    assert tokenizer.decode(ids) == "<|end|><think>"


def test_an_unknown_token_is_matched_and_hidden_as_control_tokens_are(tmp_path: Path) -> None:
    tokens, _ = gguf_files.trained_bpe()
    for vocabulary, index in ((bpe("qwen2", {"<unk>": UNKNOWN}), len(tokens)), (spm(PIECES, add_bos_token=False), 0)):
        vocabulary.pop("tokenizer.ggml.unknown_token_id", None)
        tokenizer = tokenizer_of(tmp_path, vocabulary)
        assert tokenizer("<unk>").input_ids == [index]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("vocabulary", "adds"),
    [
        (bpe("qwen2", {"<s>": CONTROL}), False),
        (bpe("gpt-2", {"<s>": CONTROL}), False),
        (bpe("llama-bpe", {"<s>": CONTROL}), True),
        (bpe("tekken", {"<s>": CONTROL}), True),
        (bpe("llama-bpe", {"<s>": CONTROL}, add_bos_token=False), False),
        (bpe("qwen2", {"<s>": CONTROL}, add_bos_token=True), True),
        (spm({"h": (0.0, NORMAL)}), True),
        (spm({"h": (0.0, NORMAL)}, add_bos_token=False), False),
    ],
)
def test_bos_is_put_before_a_text_as_the_file_says_or_its_kind_does(
    tmp_path: Path, vocabulary: dict[str, Any], adds: bool
) -> None:
    bos = vocabulary["tokenizer.ggml.tokens"].index("<s>")
    tokenizer = tokenizer_of(tmp_path, {**vocabulary, "tokenizer.ggml.bos_token_id": bos})
    assert tokenizer.bos_token_id == bos
    assert (tokenizer("hh").input_ids[0] == bos) == adds
    assert tokenizer("hh", add_special_tokens=False).input_ids[0] != bos
    tokenizer.save_pretrained(tmp_path / "saved")
    again = quicksilver.load_tokenizer(_with_config(tmp_path / "saved"))
    assert again("hh").input_ids == tokenizer("hh").input_ids


def _with_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_eos_is_put_behind_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    for adds in (False, True):
        tokenizer = tokenizer_of(tmp_path, spm({"h": (0.0, NORMAL)}, add_eos_token=adds))
        assert (tokenizer("h").input_ids[-1] == 2) == adds


PIECES = {
    "\u2581": (-1.0, NORMAL), "t": (-20.0, NORMAL), "h": (-21.0, NORMAL), "e": (-22.0, NORMAL), "r": (-23.0, NORMAL),
    "th": (-2.0, NORMAL), "he": (-1.5, NORMAL), "\u2581th": (-3.0, NORMAL), "\u2581the": (-4.0, NORMAL),
    "er": (-5.0, NORMAL), "ere": (-9.0, NORMAL), "\u2581\u2581": (-6.0, NORMAL), "the": (-0.5, NORMAL),
    "\u2581t": (-7.0, NORMAL), "<h1>": (-1000.0, USER_DEFINED), "<u5>": (0.0, UNUSED), "ee": (-8.0, NORMAL),
}  # fmt: skip


def merged(text: str) -> list[str]:
    """Merge, again and again, the neighbours that make the piece of the best score, the leftmost of several."""
    parts = list(text)
    scores = {piece: score for piece, (score, kind) in PIECES.items() if kind == NORMAL}
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_pieces_are_merged_by_score_with_a_space_before_the_text_unless_the_file_denies_it(
    tmp_path: Path, prefix: bool | None
) -> None:
    keys = {} if prefix is None else {"add_space_prefix": prefix}
    vocabulary = spm(PIECES, add_bos_token=False, **keys)
    tokens: list[str] = vocabulary["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    texts = ("the", "there", "ththe", " the", "t  here", "eee", "rthe the", "hethe")
    for text in texts:
        whole = text if prefix is False else f" {text}"
        expected = [tokens.index(part) for part in merged(whole.replace(" ", "\u2581"))]
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == text
    if prefix is False:
        assert tokenizer("<u5>").input_ids != [tokens.index("<u5>")]
        assert tokenizer("e<h1>e").input_ids == [tokens.index(each) for each in ("e", "<h1>", "e")]
    assert llama_ids(tmp_path / "model.gguf", texts) == [tokenizer(text).input_ids for text in texts]


def test_a_character_of_no_piece_is_its_bytes_and_they_are_it_again(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, spm(PIECES, add_bos_token=False, add_space_prefix=False))
    ids = tokenizer("\u65e5t").input_ids
    assert ids == [*(3 + byte for byte in "\u65e5".encode()), 259 + 1]
    assert tokenizer.decode(ids) == "\u65e5t"
    assert tokenizer("<0x0A>").input_ids[0] != 3 + 10  # a text, and not a byte's name


def test_runs_of_spaces_and_lines_are_single_tokens_as_in_gemma(tmp_path: Path) -> None:
    own = {**PIECES, "   ": (-1000.0, USER_DEFINED), "\n\n": (-1000.0, USER_DEFINED)}
    vocabulary = spm(own, add_bos_token=False, add_space_prefix=False)
    tokens: list[str] = vocabulary["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    for text, expected in (("e   e", ["e", "   ", "e"]), ("\n\ne", ["\n\n", "e"])):
        assert tokenizer(text).input_ids == [tokens.index(each) for each in expected]
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    literal = tokenizer("e\u2581\u2581\u2581e").input_ids  # as the trained model reads it, not as llama.cpp does
    assert literal == [tokens.index(each) for each in ("e", "   ", "e")]


STOPS = {
    "<|im_end|>": CONTROL, "<|endoftext|>": CONTROL, "<|eot_id|>": CONTROL, "<end_of_turn>": CONTROL,
    "<|file_sep|>": CONTROL, "<|eom_id|>": USER_DEFINED,
}  # fmt: skip


def test_a_text_ends_with_any_token_that_ends_it_and_does_not_show_it(tmp_path: Path) -> None:
    first = len(gguf_files.trained_bpe()[0])
    others = {"</s>": NORMAL, "<think>": USER_DEFINED, "<|im_start|>": CONTROL, "mine": CONTROL}
    tokens = {**STOPS, **others}
    stops = [first + list(tokens).index(text) for text in (*STOPS, "mine")]
    vocabulary = bpe("qwen2", tokens, eos_token_id=stops[0], eot_token_id=stops[-1])
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=first + len(tokens)
    )
    path = gguf_files.write(
        tmp_path / "model.gguf",
        {**gguf_files.describe(config), **vocabulary},
        gguf_files.stored(tiny.from_config(config)),
    )
    model, tokenizer = quicksilver.load(path), quicksilver.load_tokenizer(path)
    assert model.generation_config.eos_token_id == sorted(stops)
    prompt = torch.tensor([[5, 6]])
    for forced in range(first, first + len(tokens)):
        output = model.generate(
            prompt, max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList([_Force(forced)])
        )
        assert output.shape[1] == (3 if forced in stops else 5)
        if forced in stops:
            assert tokenizer.decode(output[0, 2:], skip_special_tokens=True) in ("", "<|eom_id|>")


class _Force(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([self._token]), 0.0)


def test_ids_that_are_no_tokens_are_left_out_and_said(tmp_path: Path) -> None:
    vocabulary = bpe("qwen2", {"<|im_end|>": CONTROL}, eos_token_id=100_000, padding_token_id=3)
    model = GgufModel(vocabulary_only(tmp_path / "model.gguf", vocabulary))
    with pytest.warns(TokenizerWarning, match=r"eos_token_id = 100000 is no token"):
        tokenizer = model.tokenizer()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 3)
    with pytest.warns(TokenizerWarning):
        assert model.generation_config.eos_token_id == [len(gguf_files.trained_bpe()[0])]


def test_fillers_of_the_vocabulary_decode_to_nothing(tmp_path: Path) -> None:
    first = len(gguf_files.trained_bpe()[0])
    tokenizer = tokenizer_of(tmp_path, bpe("qwen2", {f"[PAD{i}]": UNUSED for i in range(first, first + 5)}))
    assert tokenizer.decode([first, first + 4]) == ""
    assert len(tokenizer) == first


def test_texts_that_two_tokens_share_are_the_last_ones(tmp_path: Path) -> None:
    first = len(gguf_files.trained_bpe()[0])
    vocabulary = bpe("qwen2", {"<twice>": USER_DEFINED, "<x>": USER_DEFINED})
    vocabulary["tokenizer.ggml.tokens"][-1] = "<twice>"
    tokenizer = tokenizer_of(tmp_path, vocabulary)
    assert tokenizer("<twice>").input_ids == [first + 1]
    assert tokenizer.decode([first]) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "none"}, "there is no tokenizer in this file"),
        ({"model": "bert"}, "the tokenizer 'bert' is not supported"),
        ({"merges": []}, "merges are missing"),
        ({"merges": ["ab"]}, "'ab' is no pair"),
        ({"token_type": [1, 2]}, "token_type are missing, or not as many"),
        ({"model": "llama"}, "scores are missing"),
    ],
)
def test_a_vocabulary_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    vocabulary = bpe("qwen2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    vocabulary = {key: value for key, value in vocabulary.items() if value != []}
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{reason}"):
        tokenizer_of(tmp_path, vocabulary)


KNOWN_IDS = {
    "smollm2-135m": {
        "hi": [6004], "a  1": [81, 256, 33], "\t\t1": [1656, 33], "a   12": [81, 333, 33, 34], "a\x04b": [81, 82],
    },
    "qwen2.5-coder-0.5b": {
        "hi": [6023], "a  1": [64, 220, 220, 16], "<tool_call>x": [151657, 87], "cafe\u0301": [924, 58858],
    },
    "gemma3-270m": {
        "<h1>a": [2, 184, 236746], "a     b": [2, 236746, 141, 236763], "\u2581x \u2581": [2, 1123, 138],
    },
}  # fmt: skip
"""Ids of trained models; of the last texts of Qwen and Gemma as their own tokenizers give them, llama.cpp does not."""
STOP_IDS = {
    "smollm2-135m": [0, 2, 4],
    "qwen2.5-coder-0.5b": [151643, 151645, 151662, 151663, 151664],
    "gemma3-270m": [1, 106],
}


@pytest.mark.parametrize("name", KNOWN_IDS)
def test_trained_models_have_the_ids_that_are_known(name: str) -> None:
    model = GgufModel(gguf_files.real(name))
    tokenizer = model.tokenizer()
    assert {text: tokenizer(text).input_ids for text in KNOWN_IDS[name]} == KNOWN_IDS[name]
    assert model.generation_config.eos_token_id == STOP_IDS[name]
    expected = llama_ids(model.file.path, TEXTS)
    assert [tokenizer(text).input_ids for text in TEXTS] == expected


def test_a_trained_model_renders_its_own_chat() -> None:
    tokenizer = GgufModel(gguf_files.real("smollm2-135m")).tokenizer()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == turns
