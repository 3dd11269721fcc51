"""Texts on the command line: every command that reads one reads its own characters, and says what it left out."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SENTENCES, Outcome

CRLF = SENTENCES.replace(" ", "\r\n") * 4
CUT = ("--context", 32, "--stride", 16)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A text with CRLF line ends that begins with a byte order mark."""
    path = tmp_path / "marked.txt"
    path.write_bytes(codecs.BOM_UTF8 + CRLF.encode())
    return path


@pytest.fixture
def note(marked: Path) -> str:
    return f"quicksilver: note: {marked}: the byte order mark it begins with is left out"


def test_eval_scores_every_byte_but_the_mark(
    cli: Callable[..., Outcome], folder: Path, marked: Path, note: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    outcome = cli("eval", folder, "--text", marked, *CUT, "--json", out)
    assert (outcome.status, outcome.said) == (0, [note])
    (result,) = json.loads(out.read_text())
    assert result["tokens_scored"] == len(CRLF.encode()) - 1
    assert result["protocol"]["scored_bytes"] == len(CRLF.encode()) - 1


def test_documents_may_begin_with_a_mark(cli: Callable[..., Outcome], folder: Path, marked: Path, note: str) -> None:
    marked.write_text(json.dumps({"text": SENTENCES}) + "\r\n", encoding="utf-8-sig", newline="")
    outcome = cli("eval", folder, "--documents", marked, *CUT)
    assert (outcome.status, outcome.said) == (0, [note])


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "{folder}", "-o", "{made}", "--calibration", "{marked}"),
        ("plan", "fit", "{folder}", "channel-5bit", "-o", "{made}", "--calibration", "{marked}"),
        ("eval", "{folder}", "--text", "{text}", "--plan", "channel-5bit", "--calibration", "{marked}", *CUT),
    ],
    ids=["quantize", "plan fit", "eval"],
)
def test_calibration_texts_too(
    cli: Callable[..., Outcome], folder: Path, marked: Path, note: str, text_file: Path, arguments: tuple[object, ...]
) -> None:
    names = {"folder": folder, "marked": marked, "text": text_file, "made": marked.with_name("made")}
    outcome = cli(*(str(argument).format(**names) for argument in arguments))
    assert outcome.status == 0, outcome.err
    assert outcome.said.count(note) == 1, outcome.err


def test_calibrate_too(cli: Callable[..., Outcome], folder: Path, marked: Path, note: str) -> None:
    output = marked.with_name("made.json")
    outcome = cli("calibrate", folder, "--text", marked, "--max-delta-nll", 0.1, "--context", 64, "-o", output)
    assert outcome.said[0] == note
    assert "windows are too few" in outcome.err  # the text is short, so that this is quick


def test_a_prompt_on_stdin_may_begin_with_a_mark(cli: Callable[..., Outcome], folder: Path) -> None:
    plain, marked = (
        cli("generate", folder, "-", "--max-new-tokens", 4, stdin=mark + b"Once\r\nupon")
        for mark in (b"", codecs.BOM_UTF8)
    )
    assert marked.out == plain.out
    assert plain.said == []
    assert marked.said == ["quicksilver: note: the prompt on stdin: the byte order mark it begins with is left out"]
    refused = cli("generate", folder, "-", stdin="Once".encode("utf-16"))
    assert refused.status == 2
    assert refused.said[0].startswith("quicksilver: error: the prompt on stdin: UTF-16 text")
