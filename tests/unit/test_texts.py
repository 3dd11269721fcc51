"""Texts: a file's characters are what is scored, whatever ends its lines; a byte order mark before it is not."""

from __future__ import annotations

import codecs
import json
import re
import warnings
from pathlib import Path

import pytest

from quicksilver.errors import ByteOrderMarkWarning, InputError
from quicksilver.measure.texts import Corpus, read_documents, read_text
from quicksilver.measure.windows import WindowConfig, cut
from tests import tiny
from training import common as training
from training.bits_per_byte import read_scored_documents

TEXT = "naïve\r\nMac\rNEL\x85LS\u2028PS\u2029VT\vFF\f日本 🙂\r\n\r\nand a mark\ufeff inside\n"
MARK = codecs.BOM_UTF8


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "book.txt"


def test_no_character_of_a_text_is_changed(file: Path) -> None:
    file.write_bytes(TEXT.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = read_text(file)
    assert corpus.texts == (TEXT,)
    windowed = cut(corpus, tiny.tokenizer(), WindowConfig(16, 7, bos_id=0))
    assert windowed.scored_bytes == file.stat().st_size


@pytest.mark.parametrize("limit", range(2, 40, 3))
def test_bytes_of_the_first_tokens_are_those_of_their_characters(limit: int) -> None:
    windowed = cut(Corpus("t", (TEXT,), separate=True), tiny.tokenizer(), WindowConfig(16, 7, 0, max_tokens=limit))
    whole = TEXT.encode()[:limit].decode(errors="ignore")  # a token of the tiny tokenizer is a byte
    cut_through = "" if len(whole.encode()) == limit else TEXT[len(whole)]
    assert windowed.scored_bytes == len((whole + cut_through).encode())


def test_bytes_in_proportion_where_a_tokenizer_cannot_tell() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **_: object) -> object:
            return tiny.tokenizer()(text)

    corpus, size = Corpus("t", (TEXT,), separate=True), len(TEXT.encode())
    assert cut(corpus, Slow(), WindowConfig(16, 7, 0)).scored_bytes == size
    assert cut(corpus, Slow(), WindowConfig(16, 7, 0, max_tokens=20)).scored_bytes == 20


@pytest.mark.parametrize("rest", [TEXT, "\ufeff" + TEXT], ids=["one mark", "two"])
def test_a_byte_order_mark_is_left_out_and_said(file: Path, rest: str) -> None:
    file.write_bytes(MARK + rest.encode())
    with pytest.warns(ByteOrderMarkWarning, match=re.escape(str(file))) as caught:
        assert read_text(file).texts == (rest,)
    assert len(caught) == 1
    file.write_bytes(MARK)
    with pytest.warns(ByteOrderMarkWarning), pytest.raises(InputError, match="the text is empty"):
        read_text(file)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_another_encoding_is_named_by_its_mark(file: Path, encoding: str) -> None:
    file.write_bytes(("\ufeff" + TEXT).encode(encoding))
    for read in (read_text, read_documents):
        with pytest.raises(InputError, match=rf"book\.txt: {encoding[:6].upper()} text.*convert it to UTF-8"):
            read(file)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
def test_a_line_feed_alone_ends_a_line_of_json(file: Path, end: str, mark: bytes) -> None:
    texts = (TEXT, "second\u2028line\x85", "\ufeffthird")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    assert "\u2028" in lines[1]
    file.write_bytes(mark + end.join(lines).encode())
    with warnings.catch_warnings(record=True) as caught:
        assert read_documents(file).texts == texts
    assert [warning.category for warning in caught] == [ByteOrderMarkWarning] * bool(mark)


def test_a_mark_before_a_later_line_is_named(file: Path) -> None:
    file.write_text('{"text": "a"}\n\ufeff{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: not a JSON object .* a byte order mark stands before it"):
        read_documents(file)


def test_training_reads_the_same_characters(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(MARK + TEXT.encode())
    assert training.read_text(file) == TEXT
    assert capsys.readouterr().err.splitlines().count(f"{file}: the byte order mark it begins with is left out") == 1
    lines = file.with_suffix(".jsonl")
    lines.write_bytes((json.dumps({"text": TEXT}, ensure_ascii=False) + "\r\n").encode() * 2)
    assert read_scored_documents(lines) == [TEXT, TEXT]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_training_splits_at_blank_lines_of_any_kind(end: str) -> None:
    text = end.join(("", "one", "still one", "", "two", "", "", "", "three", ""))
    assert training.split_documents(text) == [f"one{end}still one", "two", "three"]
