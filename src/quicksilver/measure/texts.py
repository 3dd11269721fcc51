"""Evaluation texts: a text file, a file of documents, or a public dataset; read, never changed."""

import codecs
import json
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quicksilver.core.sources import hub_answers
from quicksilver.errors import ByteOrderMarkWarning, InputError, first_line

_C4_DOCUMENTS = 1100  # as many validation documents as quantization papers commonly take
_DATASETS = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
_MARK = "\ufeff"
_OTHER_MARKS = {  # UTF-32 first: its mark may begin with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Corpus:
    """Texts to score."""

    name: str  # for the report
    texts: tuple[str, ...]  # one long text, or separate documents
    separate: bool  # each text is scored on its own, however short


def read_text(path: str | Path) -> Corpus:
    """Read one long UTF-8 text, every character as in the file, line ends too; InputError where that cannot be."""
    text = _read(path)
    if not text.strip():
        raise InputError(f"{path}: the text is empty")
    return Corpus(Path(path).name, (text,), separate=False)


def read_documents(path: str | Path) -> Corpus:
    """Read documents from JSON lines with a "text" field, each ended by a line feed; InputError for anything else."""
    texts = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            marked = ": a byte order mark stands before it" if line.startswith(_MARK) else ""
            raise InputError(f'{path}, line {number}: not a JSON object with a "text" field{marked}') from None
        if not isinstance(text, str):
            raise InputError(f'{path}, line {number}: "text" is not a string')
        if not is_encodable(text):
            raise InputError(f'{path}, line {number}: "text" holds half of a surrogate pair')
        if text.strip():
            texts.append(text)
    if not texts:
        raise InputError(f"{path}: no document holds any text")
    return Corpus(Path(path).name, tuple(texts), separate=True)


def read_dataset(name: str) -> Corpus:
    """Load a public evaluation split through `datasets`; InputError where it is unknown or cannot be had."""
    if name not in _DATASETS:
        raise InputError(f"dataset {name!r} is not known; there are {', '.join(_DATASETS)}")
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"--dataset {name} needs the package `datasets`: pip install 'quicksilver-llm[datasets]',"
            " or pass a local file with --text or --documents"
        ) from None
    repo_id, config = _DATASETS[name]
    reason = hub_answers("dataset", repo_id)
    if reason is not None:
        raise InputError(
            f"--dataset {name}: the hub did not provide {repo_id} ({reason});"
            " download the text elsewhere and pass it with --text FILE or --documents FILE.jsonl"
        )
    try:
        return _load(name, repo_id, config, datasets)
    except Exception as error:  # a download fails in as many ways as there are networks and disks
        raise InputError(
            f"--dataset {name}: reading {repo_id} failed ({first_line(error)}); pass a local file with --text or"
            " --documents"
        ) from None


def decode(data: bytes, source: str | Path) -> str:
    """Return UTF-8 text but for a byte order mark before it, which is warned of; InputError for any other text."""
    other = next((mark for mark in _OTHER_MARKS if data.startswith(mark)), None)
    if other is not None:
        shown = other.hex(" ").upper()
        raise InputError(f"{source}: {_OTHER_MARKS[other]} text, by its first bytes {shown}; convert it to UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start})") from None
    if not text.startswith(_MARK):
        return text
    warnings.warn(f"{source}: the byte order mark it begins with is left out", ByteOrderMarkWarning, stacklevel=2)
    return text.removeprefix(_MARK)


def is_encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    return not any("\ud800" <= symbol <= "\udfff" for symbol in text)


def _load(name: str, repo_id: str, config: str, datasets: Any) -> Corpus:
    if name != "c4":
        lines = datasets.load_dataset(repo_id, config, split="test")["text"]
        return Corpus(f"{name} test (raw)", ("".join(lines),), separate=False)
    rows = datasets.load_dataset(repo_id, config, split="validation", streaming=True)
    texts = tuple(row["text"] for row in islice(rows, _C4_DOCUMENTS))
    return Corpus(f"{name} en validation, first {_C4_DOCUMENTS} documents", texts, separate=True)


def _read(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    return decode(data, path)
