"""Writing files so that an interruption leaves the old file or none, never half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from quicksilver.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes through a temporary file in the same folder, then rename it.

    Raises:
        InputError: the file cannot be written there.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)
