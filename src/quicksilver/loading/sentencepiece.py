"""`tokenizer.model` files of sentencepiece, turned into tokenizers of Hugging Face that give sentencepiece's own ids.

transformers does that too, through two more packages, and drops the space that sentencepiece puts before a text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

SPACE = "▁"  # what sentencepiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class Piece(NamedTuple):
    """A token: its text, its score (the higher the sooner it is made), its kind."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says."""

    pieces: tuple[Piece, ...]  # all tokens by id
    special_ids: dict[str, int]  # by "unk", "bos", "eos" and "pad"; those that the model has
    is_unigram: bool  # whether a text's pieces are its likeliest ones, not those of byte-pair merges
    byte_fallback: bool  # whether a character that no piece has becomes its bytes
    charsmap: bytes  # how characters are normalized, compiled; empty for not at all
    add_dummy_prefix: bool  # whether a space is put before every text
    remove_extra_whitespaces: bool  # whether spaces at both ends, and all but one of several, are dropped
    adds_symbols: bool = False  # whether symbols of the model's maker cut a text up before all else, as in llama.cpp

    @classmethod
    def parse(cls, data: bytes) -> SentencePieceModel:
        """Read a file's bytes; ValueError where it is no such file, or of a kind that `tokenizers` does not have."""
        try:
            fields = list(_fields(data))
            pieces = tuple(_piece(dict(_fields(value))) for number, value in fields if number == 1)
            trainer, normalizer = (dict(_fields(b"".join(v for n, v in fields if n == number))) for number in (2, 3))
        except (LookupError, struct.error, TypeError, AttributeError, UnicodeDecodeError):
            raise ValueError("not a sentencepiece model, or a damaged one") from None
        if not pieces:
            raise ValueError("not a sentencepiece model, or a damaged one: it holds no tokens")
        kind = trainer.get(3, _UNIGRAM)
        if kind not in (_UNIGRAM, _BPE):
            raise ValueError("a sentencepiece model of words or characters, which is not supported")
        if trainer.get(24) or not normalizer.get(5, 1):
            raise ValueError("a sentencepiece model with spaces after words, or unescaped, which is not supported")
        ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43)}
        known = {name: i for name, i in ids.items() if i is not None and i < len(pieces)}  # none is -1: 2 ** 64 - 1
        return cls(
            pieces,
            known,
            kind == _UNIGRAM,
            bool(trainer.get(35, 0)),
            normalizer.get(2, b""),
            bool(normalizer.get(3, 1)),
            bool(normalizer.get(4, 1)),
        )

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens' texts, by the names transformers has for them ("bos_token")."""
        return {f"{name}_token": self.pieces[index].text for name, index in self.special_ids.items()}

    def tokenizer(self) -> Any:
        """Return the `tokenizers.Tokenizer` that gives the same ids; control tokens in a text are recognized."""
        from tokenizers import AddedToken, Tokenizer

        made = Tokenizer(self._unigram() if self.is_unigram else self._bpe())
        made.normalizer = self._normalizer()
        if (pre_tokenizer := self._pre_tokenizer()) is not None:
            made.pre_tokenizer = pre_tokenizer
        made.decoder = self._decoder()
        special = {*self.special_ids.values(), *(i for i, piece in enumerate(self.pieces) if piece.kind == CONTROL)}
        made.add_special_tokens([AddedToken(self.pieces[i].text, normalized=False) for i in sorted(special)])
        if self.adds_symbols:  # of normal form, unless that would put a space before each
            form = not self.add_dummy_prefix
            made.add_tokens([AddedToken(text, normalized=form, special=False) for text in self._symbols()])
        return made

    def _symbols(self) -> list[str]:
        return [piece.text for piece in self.pieces if piece.kind == USER_DEFINED]

    def _unigram(self) -> Any:
        from tokenizers.models import Unigram

        vocab = [(piece.text, piece.score) for piece in self.pieces]
        return Unigram(vocab, unk_id=self.special_ids.get("unk"), byte_fallback=self.byte_fallback)

    def _bpe(self) -> Any:
        from tokenizers.models import BPE

        return BPE(
            {piece.text: index for index, piece in enumerate(self.pieces) if piece.kind != UNUSED},
            self._merges(),
            unk_token=self.special_tokens.get("unk_token"),
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
            ignore_merges=not self.adds_symbols and bool(self._symbols()),  # these stand alone, and whole
        )

    def _merges(self) -> list[tuple[str, str]]:
        """Return every pair of pieces that makes a piece, those of the highest score first."""
        rank = {piece.text: index for index, piece in enumerate(self.pieces) if piece.kind == NORMAL}
        merges = []
        for text in rank:
            pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            merges += [
                (-self.pieces[rank[text]].score, rank[left], rank[right], left, right)
                for left, right in pairs
                if left in rank and right in rank
            ]
        return [(left, right) for *_, left, right in sorted(merges)]

    def _normalizer(self) -> Any:
        from tokenizers import Regex, normalizers

        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.remove_extra_whitespaces:
            ends = Regex(rf"\A +|[ {SPACE}]+\z")  # of a text's own signs for a space sentencepiece drops the last ones
            steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])

    def _pre_tokenizer(self) -> Any:
        """Return what sets apart symbols of the model's maker, and names of bytes, which are no pieces of a text."""
        from tokenizers import Regex, pre_tokenizers

        symbols = [] if self.adds_symbols else self._symbols()
        pattern = "|".join(re.escape(text) for text in sorted(symbols, key=len, reverse=True))
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if symbols else []
        if self.is_unigram and any(piece.kind == BYTE for piece in self.pieces):
            steps.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
        return pre_tokenizers.Sequence(steps) if steps else None

    def _decoder(self) -> Any:
        from tokenizers import decoders

        steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.add_dummy_prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        return decoders.Sequence(steps)


def _piece(fields: dict[int, Any]) -> Piece:
    return Piece(fields[1].decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield a protocol buffer's fields, number and an int or bytes; IndexError or TypeError for a damaged one."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise TypeError(f"wire type {wire_type}")
        if position + size > len(data):
            raise IndexError("cut off")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
