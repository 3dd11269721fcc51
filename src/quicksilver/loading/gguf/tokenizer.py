"""Tokenizers of GGUF files as transformers' fast ones: how texts are split, special tokens, chat templates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from quicksilver.core.checks import is_whole
from quicksilver.errors import ModelError, TokenizerWarning, UnsupportedModelError
from quicksilver.loading.gguf.splits import SPLITS, Split
from quicksilver.loading.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
)

_PREFIX = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
"""Keys of special tokens (so spelt), and transformers' names."""
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_STOPS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>",
    # of files one after the other, with a gap to fill: what follows is another file
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
"""Texts of control tokens at which llama.cpp ends a text. A file names one of them, and models end with others too."""


class Vocabulary:
    """The tokens of a file, and what it says of them.

    Raises:
        ModelError: there is no vocabulary, or it does not fit together.
        UnsupportedModelError: it is of a kind that is not supported.

    Warns:
        TokenizerWarning: something is left open, or makes no sense and is left out.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.kind = self._get("model")
        self.tokens = read_tokens(metadata)
        if self.kind in (None, "none", "no_vocab") or not self.tokens:
            raise ModelError("there is no tokenizer in this file")
        if self.kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"the tokenizer {self.kind!r} is not supported; supported: gpt2 (BPE), llama (SPM)"
            )
        self.kinds: list[int] = self._list("token_type", [NORMAL] * len(self.tokens))
        self.special_ids = {name: i for key, name in _SPECIAL.items() if (i := self._id(key)) is not None}

    @cached_property
    def split(self) -> Split | None:
        """How texts are split, None for sentencepiece's vocabularies, which are not."""
        if self.kind == "llama":
            return None
        name = self._get("pre")
        if name is None:
            _warn(f"{_PREFIX}pre is missing: how texts are split is not known, and llama.cpp's default is used")
            name = "default"
        if name not in SPLITS:
            raise UnsupportedModelError(f"{_PREFIX}pre = {name!r} is not known; known: {', '.join(SPLITS)}")
        return SPLITS[name]

    @property
    def adds_bos(self) -> bool:
        """Whether the first token of a text is BOS."""
        return bool(self._get("add_bos_token", self.split is None or self.split.adds_bos))

    @property
    def adds_eos(self) -> bool:
        """Whether the last token of a text is EOS."""
        return bool(self._get("add_eos_token", False))

    @property
    def adds_prefix(self) -> bool:
        """Whether sentencepiece puts a space before a text."""
        return bool(self._get("add_space_prefix", True))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a text: those that the file names so, and those that are known by their text."""
        named = {i for key in _ENDS if (i := self._id(key)) is not None}
        return sorted(named | {i for i, text in enumerate(self.tokens) if text in _STOPS and self._may_stop(i, text)})

    @property
    def chat_template(self) -> Any:
        """The template, or several by name; None where there is none.

        It writes the first token of a text where the tokenizer would: transformers adds none to a chat.
        """
        names = [key.removeprefix("tokenizer.chat_template.") for key in self._metadata if ".chat_template." in key]
        templates = {name: self._with_bos(self._metadata[f"tokenizer.chat_template.{name}"]) for name in names}
        if (default := self._metadata.get("tokenizer.chat_template")) is not None:
            templates.setdefault("default", self._with_bos(default))
        return templates.get("default") if len(templates) < 2 else templates

    def scores(self) -> list[float]:
        """Return each token's score; ModelError where there are none, or not as many as tokens."""
        return self._list("scores")

    def merges(self) -> list[tuple[str, str]]:
        """Return pairs of tokens that become one, the first sooner than the others."""
        found = []
        for line in self._get("merges", []):
            cut = line.find(" ", 1)  # a token may begin with a space
            if cut < 0:
                raise ModelError(f"{_PREFIX}merges: {line!r} is no pair")
            found.append((line[:cut], line[cut + 1 :]))
        if not found:
            raise ModelError(f"{_PREFIX}merges are missing")
        return found

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(_PREFIX + name, default)

    def _list(self, name: str, default: Any = None) -> list[Any]:
        values = self._get(name, default)
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise ModelError(
                f"{_PREFIX}{name} are missing, or not as many as tokens, of which there are {len(self.tokens)}"
            )
        return values

    def _id(self, name: str) -> int | None:
        key = f"{_PREFIX}{name}_token_id"
        value = self._metadata.get(key)
        if value is None or (is_whole(value) and 0 <= value < len(self.tokens)):
            return value
        _warn(f"{key} = {value!r} is no token, of which there are {len(self.tokens)}; it is not used")
        return None

    def _may_stop(self, index: int, text: str) -> bool:
        kind = self.kinds[index]
        return kind == CONTROL or (kind == USER_DEFINED and text.startswith("<|"))  # of chats added to a base model

    def _with_bos(self, template: str) -> str:
        bos = self.special_ids.get("bos")
        if not self.adds_bos or bos is None or "bos_token" in template or self.tokens[bos] in template:
            return template
        return "{{ bos_token }}" + template


def read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Return the texts of a file's tokens, none where it has no vocabulary; ModelError where they are no texts."""
    tokens = metadata.get(f"{_PREFIX}tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(text, str) for text in tokens):
        raise ModelError(f"{_PREFIX}tokens are no list of texts")
    return tokens


def make_tokenizer(vocabulary: Vocabulary, max_length: int) -> Any:
    """Return a fast tokenizer of transformers; ValueError or ModelError where the vocabulary makes no sense."""
    from transformers import PreTrainedTokenizerFast

    made = _byte_level(vocabulary) if vocabulary.split is not None else _sentencepiece(vocabulary)
    names = {f"{name}_token": vocabulary.tokens[i] for name, i in vocabulary.special_ids.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=max_length, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = vocabulary.chat_template
    tokenizer.add_bos_token, tokenizer.add_eos_token = vocabulary.adds_bos, vocabulary.adds_eos
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Any:
    """Return BPE over bytes written as letters, as GPT-2's; a byte that no token has is left out, as llama.cpp does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = vocabulary.split
    assert split is not None
    ids = {text: i for i, text in enumerate(vocabulary.tokens) if vocabulary.kinds[i] != UNUSED}
    pairs = [pair for pair in vocabulary.merges() if {*pair, "".join(pair)} <= ids.keys()]
    made = Tokenizer(models.BPE(ids, pairs, ignore_merges=split.looks_up_whole))
    if split.composes:
        made.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    for text, i in ids.items():
        if text and (kind := vocabulary.kinds[i]) in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED)])
    return made


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in vocabulary.kinds]
    pieces = zip(vocabulary.tokens, vocabulary.scores(), kinds, strict=True)
    return SentencePieceModel(
        pieces=tuple(Piece(*each) for each in pieces),
        special_ids={name: i for name, i in vocabulary.special_ids.items() if name in ("unk", "bos", "eos", "pad")},
        is_unigram=False,
        byte_fallback=BYTE in vocabulary.kinds,
        charsmap=b"",
        add_dummy_prefix=vocabulary.adds_prefix,
        remove_extra_whitespaces=False,
        adds_symbols=True,
    ).tokenizer()


def _warn(message: str) -> None:
    warnings.warn(message, TokenizerWarning, stacklevel=2)
