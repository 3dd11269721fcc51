"""A model's tokenizer: which files hold one, and a line that says what is wrong where none can be read."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from quicksilver.core.sources import is_gguf
from quicksilver.errors import ModelError, first_line
from quicksilver.loading.sentencepiece import SentencePieceModel

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_WHOLE = ("tokenizer.json", "vocab.json", "tekken.json")  # transformers reads these without sentencepiece
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_OF_LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(source: str, local: bool) -> Any:
    """Read the tokenizer of a folder, a file or a hub id; ModelError where there is none, or it cannot be read."""
    from transformers import AutoTokenizer

    if is_gguf(source):
        from quicksilver.loading.gguf.model import GgufModel

        return GgufModel(source).tokenizer()
    absent = f"{source}: there is no tokenizer in this folder; save the model's there with save_pretrained"
    if os.path.isdir(source) and not any((Path(source) / name).is_file() for name in _FILES):
        stray = next(iter(sorted(Path(source).glob("*.tiktoken"))), None)
        raise ModelError(absent if stray is None else _tiktoken(stray))
    try:
        tokenizer = _read_sentencepiece(source, local)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except ModelError:
        raise
    except Exception as error:  # the Rust tokenizers raise bare Exception on a corrupt file
        raise ModelError(f"{source}: cannot load the tokenizer: {first_line(error)}") from None
    if not tokenizer("a").input_ids:  # what transformers makes of too few tokenizer files
        raise ModelError(absent)
    return tokenizer


def read_special_ids(source: str, local: bool) -> list[int]:
    """Return the ids of a tokenizer's special tokens; none where there is no tokenizer that can be read."""
    try:
        if is_gguf(source):
            from quicksilver.loading.gguf.model import GgufModel

            return sorted(GgufModel(source).vocabulary.special_ids.values())
        return read_tokenizer(source, local).all_special_ids
    except ModelError:
        return []


def _read_sentencepiece(source: str, local: bool) -> Any:
    """Return the tokenizer of a `tokenizer.model` that stands alone, None where there is none."""
    from transformers import PreTrainedTokenizerFast

    file = _find(source, "tokenizer.model", local)
    if file is None or any(_find(source, name, local) for name in _WHOLE):
        return None
    data = file.read_bytes()
    if _TIKTOKEN.match(data):
        raise ModelError(_tiktoken(file))
    try:
        model = SentencePieceModel.parse(data)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    config_file = _find(source, "tokenizer_config.json", local)
    config = {} if config_file is None else json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") not in _OF_LLAMA:
        _check_packages(file, config["tokenizer_class"])
        return None
    for name in ("tokenizer_class", "auto_map", "legacy"):
        config.pop(name, None)
    adds = {name: bool(config.pop(name, name == "add_bos_token")) for name in ("add_bos_token", "add_eos_token")}
    config = {**model.special_tokens, **config}
    with tempfile.TemporaryDirectory() as folder:  # as if the model had been saved with a tokenizer.json
        model.tokenizer().save(os.path.join(folder, "tokenizer.json"))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        for name in _BESIDE:
            if (beside := _find(source, name, local)) is not None:
                shutil.copy(beside, folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.name_or_path = source
    for name, value in adds.items():  # transformers asks the tokenizer.json, which does not say
        setattr(tokenizer, name, value)
    return tokenizer


def _check_packages(file: Path, name: str) -> None:
    """Raise ModelError where transformers lacks what it reads a tokenizer of another class with."""
    from transformers.utils import import_utils

    there = {
        "sentencepiece": import_utils.is_sentencepiece_available(),
        "protobuf": import_utils.is_protobuf_available(),
    }
    missing = " and ".join(package for package, is_there in there.items() if not is_there)
    if missing:
        raise ModelError(
            f"{file}: a {name} is read with {' and '.join(there)}, and {missing} is not installed:"
            " pip install 'quicksilver-llm[sentencepiece]'"
        )


def _tiktoken(file: Path) -> str:
    return (
        f"{file}: a tiktoken vocabulary, as in the original files of Llama 3 or Qwen, which does not name the special"
        " tokens; put the tokenizer.json of the model's transformers version in its place"
    )


def _find(source: str, name: str, local: bool) -> Path | None:
    """Return where a file of a model is, downloaded first where it is on the hub; None where there is none."""
    from transformers.utils.hub import cached_file

    found = cached_file(source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
