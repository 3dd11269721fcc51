"""Folders of quantized models: written whole or not at all, and loaded without choosing codes anew."""

import copy
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.core.files import check_new_folder
from quicksilver.errors import InputError, ModelError, first_line
from quicksilver.families import quantize
from quicksilver.families.weights import FLOATS
from quicksilver.loading.plain import read_generation_config
from quicksilver.quant import AnyPrecisionWeight
from quicksilver.quant.config import QuantizationConfig, is_quantized
from quicksilver.quant.linear import BY_CHANNEL
from quicksilver.quant.storage import MAX_SHARD_SIZE, Expected, TensorWriter, give_back, read_tensors, write_tensors

_CODES = "codes"  # of an any-precision weight: one tensor for all that is kept by channel, so that headers stay short
_NO_FILE = "load-with-quicksilver.safetensors"
"""Where transformers is told to look for weights that it would else replace by random ones: it says what is missing."""


def save_quantized(
    model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a quantized model to a new folder; an interruption leaves no folder of that name.

    Args:
        model: a transformers model after `quantize_model`.
        folder: does not exist, or is empty.
        tokenizer: saved too, or None.
        max_shard_size: of one weight file, in bytes or with a unit.

    Raises:
        InputError: the folder cannot be written.
        ModelError: the model is not quantized.
    """
    if not is_quantized(model.config):
        raise ModelError("only a quantized model can be saved here; see quicksilver quantize")
    check_new_folder(folder)
    with _staged(Path(folder)) as stage:
        write_tensors(_stored_tensors(model), stage, max_shard_size)
        _write_others(model, stage, tokenizer)


def quantize_and_save(
    model: Any,
    config: QuantizationConfig,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    on_map: Callable[[], None] = lambda: None,
) -> None:
    """Do what `quantize_model` and `save_quantized` do, one map at a time: neither weights nor codes are kept.

    The model is one that `load_plain` gave and nobody has changed; where it is quantized, it is left on "meta".
    Each weight is rounded on its own, whatever the configuration's method. `on_map` is called after each map.

    Raises:
        InputError: the folder cannot be written.
        ModelError: as `quantize_model` does.
        UnsupportedModelError: the family is not supported.
    """
    check_new_folder(folder)
    outline = _without_content(model)
    quantize.outline(outline, config)
    with _staged(Path(folder)) as stage:
        with TensorWriter(_stored_tensors(outline), stage, max_shard_size) as writer, _one_thread():
            for name, module in quantize.quantize_each(model, config, after=give_back):
                for part, tensor in _stored_tensors(module).items():
                    writer.write(f"{name}.{part}", tensor)
                module.to("meta")
                on_map()
            for name, tensor in _stored_tensors(model).items():
                if not tensor.is_meta:
                    writer.write(name, tensor)
                    give_back(tensor)
        _write_others(model, stage, tokenizer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: what is divided here is short, and threads that wait for one another take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _without_content(model: nn.Module) -> Any:
    """Return a copy of a model whose parameters are on "meta"."""
    blank = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, blank)  # which copies nothing that it finds copied


def _write_others(model: Any, stage: Path, tokenizer: Any) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
    model.generation_config.to_json_file(stage / "generation_config.json")
    (stage / "config.json").write_text(_stored_config(model).to_json_string(), encoding="utf-8")  # now it loads


def load_quantized(source: str, config: Any, dtype: torch.dtype | str) -> Any:
    """Load what `save_quantized` wrote, on the CPU, other weights in a dtype; ModelError where files are damaged."""
    folder = Path(source)
    quantization = QuantizationConfig.from_dict(config.quantization_config, folder / "config.json")
    plain = copy.deepcopy(config)
    del plain.quantization_config
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    try:
        model = blank(plain, dtype)
        quantize.outline(model, quantization)
    except Exception as error:  # a configuration may ask for anything
        raise ModelError(f"{source}: cannot build the model of its configuration: {first_line(error)}") from None
    if (settings := read_generation_config(folder)) is not None:
        model.generation_config = settings
    own = _stored_tensors(model)
    tensors = read_tensors(
        folder,
        {
            name: Expected(tuple(tensor.shape), FLOATS if tensor.is_floating_point() else (tensor.dtype,))
            for name, tensor in own.items()
        },
    )
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(own[name].dtype)
    for name, module in _quantized_weights(model):
        parts = module.unpack_channels(tensors.pop(f"{name}.{_CODES}"))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for name, module in _quantized_weights(model):
        if not bool(torch.isfinite(module.get_buffer("constants").view(torch.float32)).all()):
            raise ModelError(f"{source}: tensor '{name}.constants' holds NaN or infinite values")
    return model


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside a new one, and rename it when all went well; else remove it."""
    target = folder.absolute()
    stage = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}"  # known before it is there to be removed
    try:
        stage.mkdir()
        yield stage
        stage.rename(target)
    except OSError as error:
        raise InputError(f"{folder}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, persistent buffers and codes by name; a parameter that has two names goes by the first."""
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    for name, module in _quantized_weights(model):
        prefix = f"{name}." if name else ""
        tensors[f"{prefix}{_CODES}"] = module.pack_channels()
        for part in BY_CHANNEL:
            del tensors[f"{prefix}{part}"]
    return {**{name: parameter.detach() for name, parameter in model.named_parameters()}, **tensors}


def _quantized_weights(model: nn.Module) -> list[tuple[str, AnyPrecisionWeight]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AnyPrecisionWeight)]


def _stored_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.tie_word_embeddings = quantize.is_tied(model)
    config.transformers_weights = _NO_FILE
    return config


def blank(config: Any, dtype: torch.dtype | str) -> Any:
    """Return a model whose weights are not set: memory that is never touched costs nothing."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model
