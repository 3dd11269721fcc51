"""How byte-level vocabularies split a text before they merge bytes, by the names that GGUF files have for it.

The patterns are the trained models' own, those of their tokenizer.json. Several are applied in turn, each within the
pieces that those before it left. `default` is llama.cpp's, of files that do not know better.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """What a name stands for."""

    patterns: tuple[str, ...]  # each match is a piece, and so is what lies between
    looks_up_whole: bool = False  # a piece that is a token is that token, whatever its merges say
    adds_bos: bool = False  # where the file does not say
    composes: bool = False  # a letter and its accent are one character first (NFC)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA_BPE = Split((_LLAMA3,), looks_up_whole=True, adds_bos=True)
SPLITS = {
    "gpt-2": Split((_GPT2,)),
    "smollm": Split((r"\p{N}", _GPT2)),
    "qwen2": Split((_QWEN2,), composes=True),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "tekken": Split((_TEKKEN,), looks_up_whole=True, adds_bos=True),
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""What `tokenizer.ggml.pre` may be. A name is never guessed: another split gives other tokens, and no error."""
