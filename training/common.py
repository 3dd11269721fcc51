"""Small things every training step shares: clear failures, reading text files, loading tokenizers.

Anything about models, optimisers or checkpoints lives elsewhere.
"""

from __future__ import annotations

import lzma
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLANK_LINES = re.compile(r"(?>\r\n|\r|\n){2,}")  # a CRLF is one line end, never two


class InputError(Exception):
    """The user's files or options cannot be used; the message says why."""


def say(message: str) -> None:
    """Print one progress line on stderr."""
    print(message, file=sys.stderr, flush=True)


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`; bad input becomes one line on stderr and exit status 2."""
    try:
        main()
    except (InputError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        say(f"error: {error}")
        sys.exit(2)
    sys.exit(0)


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a plain or `.xz` file, line ends as they are, without a byte order mark before it.

    Raises:
        InputError: the file is missing, empty, damaged or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"no such text file: {path}")
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rb") as handle:
            text = handle.read().decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if text.startswith("\ufeff"):
        say(f"{path}: the byte order mark it begins with is left out")
        text = text[1:]
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def split_documents(text: str) -> list[str]:
    """Split text at blank lines into documents, dropping empty ones."""
    return [part for part in (piece.strip("\r\n") for piece in _BLANK_LINES.split(text)) if part.strip()]


def read_documents(paths: list[Path], whole_files: bool = False) -> Iterator[str]:
    """Yield the documents of the files in order: one per blank-line block, or one per file."""
    for path in paths:
        text = read_text(path)
        yield from [text] if whole_files else split_documents(text)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer folder from disk, never from the network.

    Raises:
        InputError: the folder is missing, or its tokenizer has no end-of-text token.
    """
    if not folder.is_dir():
        raise InputError(f"no such tokenizer folder: {folder}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {folder}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no end-of-text token")
    return tokenizer


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then move it over `path` in one step."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
