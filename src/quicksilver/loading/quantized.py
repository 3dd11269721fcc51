"""Folders of quantized models: written whole or not at all, and loaded without choosing codes anew."""

import copy
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from quicksilver.weights.config import QuantizationConfig, is_quantized
from quicksilver.weights.forms import EXPECTED_FORM, check_form, expected_parts, not_finite
from quicksilver.weights.linear import BUFFERS, FORM
from quicksilver.weights.registration import register_method
from quicksilver.weights.storage import (
    MAX_SHARD_SIZE,
    Expected,
    StoredTensors,
    TensorWriter,
    give_back,
    write_tensors,
)

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
                for each in (module, *getattr(module, "sharing", ())):
                    each.to("meta")
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
    except Exception as error:  # a configuration may ask for anything
        raise ModelError(f"{source}: cannot build the model of its configuration: {first_line(error)}") from None
    if (settings := read_generation_config(folder)) is not None:
        model.generation_config = settings
    _read_weights(model, StoredTensors(folder), quantization)
    register_method()
    model.config.quantization_config = quantization.to_dict()
    return model


def _read_weights(model: Any, stored: StoredTensors, config: QuantizationConfig) -> None:
    """Give a plain model what is stored; ModelError where that is damaged or does not fit the model or `config`."""
    shapes = {name: quantize.part_shapes(model, name) for name in quantize.quantized_names(model, config)}
    used, shared = set[str](), quantize.shares_table(model, config)
    for name, parts in shapes.items():
        expected = {path: _expected(stored, path, shape) for path, shape in parts.items()}
        quantize.put(model, name, [_read_matrix(stored, path, wanted) for path, wanted in expected.items()])
        used |= {f"{path}.{buffer}" for path, wanted in expected.items() for buffer in wanted}
    if shared:
        quantize.share_table(model)
    plain = {name: tensor for name, tensor in _stored_tensors(model).items() if name not in used}
    stored.check_names({*plain, *used})
    for name, own in plain.items():
        tensor = stored.read(name, Expected(tuple(own.shape), FLOATS)).to(own.dtype, copy=True)
        quantize.set_tensor(model, name, tensor)
    if not shared:
        model.tie_weights()


def _read_matrix(stored: StoredTensors, path: str, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
    """Return the tensors of a matrix in codes, by the names of buffers, each in memory of its own."""
    tensors = {buffer: stored.read(f"{path}.{buffer}", wanted).clone() for buffer, wanted in expected.items()}
    if (name := not_finite(tensors)) is not None:
        raise ModelError(f"{stored.describe(f'{path}.{name}')} holds NaN or infinite values")
    return tensors


def _expected(stored: StoredTensors, path: str, shape: tuple[int, int]) -> dict[str, Expected]:
    """Return what the tensors of a matrix [out, in] in codes must be by the names of buffers.

    ModelError where its form is that of no such matrix.
    """
    name = f"{path}.{FORM}"
    form = stored.read(name, EXPECTED_FORM).tolist()
    held = [buffer for buffer in BUFFERS if f"{path}.{buffer}" in stored.names]
    try:
        check_form(form, shape)
        parts = expected_parts(form, held, lambda buffer: stored.shape_of(f"{path}.{buffer}"))
    except ModelError as error:
        raise ModelError(f"{stored.describe(name)} {error}") from None
    return {FORM: EXPECTED_FORM, **parts}


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
    """Return parameters and persistent buffers by name; what has two names goes by the first."""
    tensors = dict(model.named_parameters())
    kept, named = model.state_dict(), dict(model.named_buffers())
    return {**{n: p.detach() for n, p in tensors.items()}, **{n: tensor for n, tensor in named.items() if n in kept}}


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
