"""Plain weights, read through transformers: what is missing is refused by name, what is not used is said."""

import os
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from quicksilver.errors import ModelError, WeightFilesWarning, first_line
from quicksilver.families.quantize import is_tied
from quicksilver.weights.storage import INDEX, list_shards

GENERATION_CONFIG = "generation_config.json"
_NAMED = 3  # of all names, where there are many
_NO_WEIGHTS = re.compile(r"\.attn\.masked_bias$")
"""A constant in old files of GPT-2; other constants transformers leaves out itself."""


def read_plain(source: str, config: Any, dtype: torch.dtype | str, local: bool) -> Any:
    """Read the safetensors of a folder or a hub id, which is not asked where `local`, into transformers' model.

    Raises:
        ModelError: a file is missing or corrupt, or a tensor is missing or has another shape.

    Warns:
        WeightFilesWarning: a tensor has no place in the model, or a head has one where it should be tied.
    """
    from transformers import AutoModelForCausalLM

    if os.path.isdir(source):
        _check_files(Path(source))
        read_generation_config(Path(source))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        model, info = loaded
    except NotImplementedError as error:  # transformers compares the two, and one was not read
        if not getattr(config, "tie_word_embeddings", False):
            raise ModelError(f"{source}: cannot load the model: {first_line(error)}") from None
        raise ModelError(
            f"{source}: lm_head.weight or the token embedding, which the configuration ties to one another"
            " (tie_word_embeddings), is stored in another shape than the configuration says"
        ) from None
    except Exception as error:  # a configuration may ask for anything, and a file may hold anything
        raise ModelError(f"{source}: cannot load the model: {first_line(error)}") from None
    unexpected = sorted(name for name in info["unexpected_keys"] if not _NO_WEIGHTS.search(name))
    _check_fit(source, sorted(info["missing_keys"]), info["mismatched_keys"], unexpected)
    if unexpected:
        warn(f"{source}: the weight files hold tensors that the model has no place for, not used: {some(unexpected)}")
    if model.config.tie_word_embeddings and not is_tied(model):
        warn(own_head(source))
    return model


def own_head(source: object) -> str:
    """Return what is to be said where a head is stored that should be tied."""
    return (
        f"{source}: the configuration ties the head to the token embedding (tie_word_embeddings), but the weight"
        " files hold another lm_head.weight; that is used, as in transformers"
    )


def read_generation_config(folder: Path) -> Any:
    """Return the generation settings of a folder, None without any; ModelError where transformers rejects them."""
    from transformers import GenerationConfig

    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # settings of any kind, checked by whatever they are first used for
        raise ModelError(f"{file}: these settings cannot be used: {first_line(error)}; mend the file") from None


def _check_files(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")):
        gguf = "; a GGUF file in it is read where it is named" if list(folder.glob("*.gguf")) else ""
        raise ModelError(f"{folder}: no .safetensors weights (other formats are not read{gguf})")
    for file in list_shards(folder):
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file}: this weight file is missing; {INDEX} names it")


def _check_fit(source: str, missing: list[str], mismatched: Iterable[Any], unexpected: list[str]) -> None:
    """Raise ModelError where a tensor is missing or has another shape; the names that are there may tell why."""
    problems = []
    if missing:
        problems.append(f"missing keys: {some(missing)}")
    shapes = [f"{name} is {list(stored)}, not {list(wanted)}" for name, stored, wanted in sorted(mismatched)]
    if shapes:
        problems.append(f"mismatched keys: {some(shapes)}")
    if not problems:
        return
    if unexpected:
        problems.append(f"stored and not in the model: {some(unexpected)}")
    prefix = _prefix(missing, unexpected)
    if prefix is not None:
        problems.append(f"all of these begin with {prefix!r}: save them again without it")
    raise ModelError(f"{source}: the weight files do not fit the model; {'; '.join(problems)}")


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """Return what stands before every name that is stored, where names that are missing are the same without it."""
    if not unexpected:
        return None
    prefixes = (unexpected[0].removesuffix(name) for name in missing if unexpected[0].endswith(f".{name}"))
    return next((each for each in prefixes if all(name.startswith(each) for name in unexpected)), None)


def some(names: Collection[str]) -> str:
    """Return the first of many names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(list(names)[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def warn(message: str) -> None:
    """Warn of weight files where a function that reads a model, called by `load`, finds something odd."""
    warnings.warn(message, WeightFilesWarning, stacklevel=5)  # whoever called `load`
