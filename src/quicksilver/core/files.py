"""Writing files so that an interruption leaves the old file or none, never half of one."""

import errno
import os
import secrets
import stat
from pathlib import Path

from quicksilver.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes through a temporary file in the same folder, then rename it.

    A new file has the permissions that the umask leaves, a replaced one keeps its own. A symbolic link stays, and what
    it leads to is written. What is not a regular file, such as a device or a pipe, is written to as it is.

    Raises:
        InputError: the file cannot be written there.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data, mode)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


def check_target(option: str, given: str) -> None:
    """Raise InputError where a file could not be written later; `option` names where it was asked for."""
    if not given:
        raise InputError(f"{option} is empty: give a file's name")
    path = Path(os.path.realpath(given))
    try:
        mode = _mode(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{option} {given}: is a directory")
        if not stat.S_ISDIR(os.stat(path.parent).st_mode):
            raise InputError(f"{option} {given}: its folder is a file")
        if mode is None or stat.S_ISREG(mode):
            _try_to_write(path.parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        raise InputError(f"{option} {given}: its folder does not exist") from None
    except OSError as error:
        raise InputError(f"{option} {given}: cannot write: {error.strerror or error}") from None


def make_folder(option: str, given: str) -> Path:
    """Make a folder where there is none; raise InputError where it is not one that files can be written into."""
    if not given:
        raise InputError(f"{option} is empty: give a folder's name")
    try:
        Path(given).mkdir(parents=True, exist_ok=True)
        _try_to_write(given)
    except OSError as error:
        raise InputError(f"{option} {given}: cannot make the folder: {error.strerror or error}") from None
    return Path(given)


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Raise InputError where a folder cannot be written: it exists and is not empty, or has no parent."""
    if not os.fspath(folder):
        raise InputError("the name of the folder to write is empty")
    path = Path(folder)
    try:
        if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
            raise InputError(f"{folder}: exists already; give a new folder")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{folder}: the folder it would be in does not exist")
        _try_to_write(path.absolute().parent)
    except OSError as error:
        raise InputError(f"{folder}: cannot write: {error.strerror or error}") from None


def _try_to_write(folder: str | os.PathLike[str]) -> None:
    """Raise OSError where no file can be made in a folder; permissions do not say it of /proc, nor to root."""
    probe = Path(folder) / f".{secrets.token_hex(8)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileNotFoundError:  # the folder is there
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
    os.unlink(probe)


def _mode(path: Path) -> int | None:
    """Return the type and permissions of what a path leads to, None where there is nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    temporary = path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
        with os.fdopen(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, stat.S_IMODE(mode))
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
