"""Where a model comes from (embedded, a local folder or file, the hub) and which devices there are names for."""

import os
import re
import stat
from pathlib import Path

from quicksilver.errors import ModelError, first_line

EMBEDDED = Path(__file__).parent.parent / "data" / "models"
_HUB_TIMEOUT_S = 10.0
_READ_SUFFIXES = (".json", ".safetensors", ".model", ".gguf")
_SHARD = re.compile(r"-\d{5}(?=-of-\d{5}\.gguf$)")
_DEVICES = re.compile(r"auto|(cpu|cuda)(:(0|[1-9]\d?))?")


def embedded_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))


def resolve_model(path_or_id: str | os.PathLike[str]) -> str:
    """Return the folder or the GGUF file of a local model, the folder of an embedded one, or the hub id.

    A folder without a config.json stands for the GGUF file in it, or the first file of the set.

    Raises:
        ModelError: a path that leads to neither, or to several models.
    """
    name = os.fspath(path_or_id)
    if name in embedded_models():
        return str(EMBEDDED / name)
    if _is_folder(name):
        return name if os.path.isfile(os.path.join(name, "config.json")) else str(find_gguf(name))
    if os.path.isfile(name):
        if is_gguf(name):
            return name
        raise ModelError(
            f"{name}: no such model folder; it is a file, and folders with config.json and safetensors, or GGUF files,"
            " are read"
        )
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"{name or repr(name)}: no such model folder")
    return name


def is_gguf(source: str) -> bool:
    """Whether a local model is a GGUF file: it is called so, or begins so."""
    if not os.path.isfile(source):
        return False
    if source.lower().endswith(".gguf"):
        return True
    try:
        with open(source, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"{source}: {error.strerror or error}") from None


def find_gguf(folder: str | os.PathLike[str]) -> Path:
    """Return the GGUF file in a folder, or the first of a set; ModelError where there is none, or more than one."""
    files = sorted(Path(folder).glob("*.gguf"))
    models = {_SHARD.sub("", file.name): file for file in reversed(files)}
    if not models:
        raise ModelError(f"{folder}: the folder holds no config.json, and no GGUF file")
    if len(models) > 1:
        raise ModelError(f"{folder}: the folder holds several GGUF files; name one: {', '.join(sorted(models))}")
    return next(iter(models.values()))


def check_model(path_or_id: str | os.PathLike[str]) -> None:
    """Raise ModelError where a model is neither local, nor downloaded, nor on the hub; only then is that asked."""
    source = resolve_model(path_or_id)
    if not os.path.exists(source) and not _is_downloaded(source):
        is_local(source)


def check_device(device: str) -> None:
    """Raise ModelError where a name is no device's; whether the device is there, only PyTorch knows."""
    if not _DEVICES.fullmatch(device):
        raise ModelError(f"device {device!r} is not supported; use cpu, cuda, cuda:N or auto")


def _is_folder(name: str) -> bool:
    """Return whether a path leads to a folder; ModelError where one holds what may not be read."""
    try:
        if not stat.S_ISDIR(os.stat(name).st_mode):
            return False
        files = sorted(path for path in Path(name).iterdir() if path.suffix in _READ_SUFFIXES and path.exists())
    except PermissionError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from None
    except (OSError, ValueError):  # not there; too long a name, or one with a null character
        return False
    for path in files:
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path}: Permission denied")
    return True


def hub_answers(kind: str, repo_id: str) -> str | None:
    """Ask the hub for a "model" or "dataset", once and with a short time limit; return None, or in a line why not."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(repo_id, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # network, offline mode, unknown name, refused access: all mean no
        return first_line(error)
    return None


def is_local(source: str) -> bool:
    """Whether a model must come from disk: a folder or file, or a download where the hub is silent; else ModelError."""
    if os.path.exists(source):
        return True
    reason = hub_answers("model", source)
    if reason is None:
        return False
    if _is_downloaded(source):
        return True
    known = ", ".join(embedded_models()) or "none"
    raise ModelError(
        f"{source}: not a local folder or an embedded model ({known}), and the hub did not provide it: {reason}"
    )


def _is_downloaded(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    except HFValidationError as error:
        raise ModelError(f"{source}: neither a local folder nor a hub id: {first_line(error)}") from None
