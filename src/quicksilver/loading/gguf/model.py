"""A GGUF file read as a model of transformers: what it is, and each of its weights under transformers' name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quicksilver.errors import ModelError, first_line
from quicksilver.families.family import family_of
from quicksilver.families.quantize import take_over
from quicksilver.loading.gguf.architectures import Facts, architecture_of, read_config
from quicksilver.loading.gguf.metadata import Metadata
from quicksilver.loading.gguf.places import IN_LAYER, ROPE_FACTORS, Place, Shape, find_places
from quicksilver.loading.gguf.tokenizer import Vocabulary, make_tokenizer, read_tokens
from quicksilver.loading.quantized import blank
from quicksilver.weights.codes import GroupedCodes
from quicksilver.weights.gguf.file import GgufFile

_INDEX = re.compile(r"\.\d+(?=\.)")


class GgufModel:
    """A file, or a set of files of which any is named, as a model of transformers; weights are read when asked for.

    Attributes:
        file: the file's own names, types and metadata.
        config: transformers' configuration.
        shapes: of the model's parameters by name, of linear maps [out, in].

    Raises:
        ModelError: the file is damaged, or does not fit together.
        UnsupportedModelError: its architecture, a type of its tensors, a tensor or a setting is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = GgufFile(path)
        factors = self.file.read(ROPE_FACTORS) if ROPE_FACTORS in self.file.shapes else None
        try:
            metadata = Metadata(self.file.metadata)
            architecture = architecture_of(metadata)
            if (layers := metadata.whole("block_count")) > len(self.file.shapes):
                raise ModelError(f"{len(self.file.shapes)} tensors are too few for {layers} layers")
            self.config = _checked_config(metadata, self._facts(factors))
            self.config.name_or_path = os.fspath(path)
            self.shapes = _parameter_shapes(self.config)
            self._places = find_places(self.file.shapes, self.shapes, architecture, self.config)
        except ModelError as error:
            raise self._named(error) from None

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is in codes."""
        return self.file.is_quantized

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens, and what the file says of them; ModelError where it has none that can be used."""
        try:
            return Vocabulary(self.file.metadata)
        except ModelError as error:
            raise self._named(error) from None

    @cached_property
    def generation_config(self) -> Any:
        """transformers' generation settings with every token that ends a text; bare where the file has no tokens."""
        from transformers import GenerationConfig

        if not read_tokens(self.file.metadata):
            return GenerationConfig()
        special = {f"{name}_token_id": self.vocabulary.special_ids.get(name) for name in ("bos", "pad")}
        return GenerationConfig(**special, eos_token_id=self.vocabulary.stop_ids or None)

    def tokenizer(self) -> Any:
        """Return the tokenizer, one of transformers' fast ones; ModelError where there is none that can be used."""
        vocabulary = self.vocabulary
        try:
            tokenizer = make_tokenizer(vocabulary, self.config.max_position_embeddings)
        except ModelError as error:
            raise self._named(error) from None
        except Exception as error:  # the Rust tokenizers raise bare Exception where a vocabulary makes no sense
            raise ModelError(f"{self.file.path}: cannot make the tokenizer: {first_line(error)}") from None
        tokenizer.name_or_path = self.config.name_or_path
        return tokenizer

    def tensors(self) -> Iterator[tuple[str, Tensor | GroupedCodes]]:
        """Give each parameter of transformers' model with its name, in the model's order, read when it is its turn.

        Matrices are [out, in] whatever transformers has, in codes where the file has codes, else floats in the file's
        own type. A head that is the embedding is not given again.
        """
        for name, place in self._places.items():
            yield name, self._read(name, place)

    def _read(self, name: str, place: Place) -> Tensor | GroupedCodes:
        if place.tensor == "":
            return torch.zeros(self.shapes[name])
        made = self.file.read(place.tensor)
        if place.rows is not None:
            made = made.rows(place.rows) if isinstance(made, GroupedCodes) else made.index_select(0, place.rows)
        if isinstance(made, GroupedCodes) or not place.offset:
            return made
        return made.float() - place.offset

    def _facts(self, factors: Tensor | GroupedCodes | None) -> Facts:
        shapes = self.file.shapes
        if len(shapes.get("token_embd.weight", ())) != 2:
            raise ModelError("token_embd.weight, the token embedding, is missing or no matrix")
        rows, tokens = shapes["token_embd.weight"][0], len(read_tokens(self.file.metadata))
        if tokens > rows:
            raise ModelError(f"token_embd.weight has {rows} rows, and there are {tokens} tokens")
        if isinstance(factors, GroupedCodes) or (factors is not None and factors.dim() != 1):
            raise ModelError(f"{ROPE_FACTORS} is no list of floats")
        biased = [match[2] for name in shapes if name.endswith(".bias") and (match := IN_LAYER.fullmatch(name))]
        return Facts(
            vocab_size=rows,
            has_head="output.weight" in shapes,
            has_biases=lambda prefix: any(name.startswith(prefix) for name in biased),
            rope_factors=None if factors is None else factors.float(),
        )

    def _named(self, error: ModelError) -> ModelError:
        return type(error)(f"{self.file.path}: {error}")


def float_model(model: GgufModel) -> Any:
    """Return transformers' model in float32, its weights what the file's codes say, to the last bit."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        made = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    made.tie_weights()
    for name, tensor in model.tensors():
        weight = tensor.dequantize() if isinstance(tensor, GroupedCodes) else tensor.float()
        weight = weight.t().contiguous() if is_inputs_first(model.config, name) else weight
        made.get_parameter(name).data = weight
    made.generation_config = model.generation_config
    return made.eval()


def codes_model(model: GgufModel, dtype: torch.dtype | str = torch.float32) -> Any:
    """Return transformers' model with the file's codes as they are, as any-precision weights; the rest in a dtype."""
    made = blank(model.config, torch.float32 if isinstance(dtype, str) else dtype)
    try:
        take_over(made, _for_transformers(model))
    except ModelError as error:
        raise type(error)(f"{model.file.path}: {error}") from None
    made.generation_config = model.generation_config
    return made.eval()


def _for_transformers(model: GgufModel) -> Iterator[tuple[str, Tensor | GroupedCodes]]:
    """Give each parameter with its name, floats as transformers keeps them."""
    for name, tensor in model.tensors():
        turned = isinstance(tensor, Tensor) and is_inputs_first(model.config, name)
        yield name, tensor.t().contiguous() if turned else tensor  # type: ignore[union-attr]


def is_inputs_first(config: Any, name: str) -> bool:
    """Whether a parameter is a linear map's that transformers keeps as [in, out]."""
    family = family_of(config)
    module, _, kind = _INDEX.sub(".*", name).rpartition(".")
    return family.inputs_first and kind == "weight" and module in family.map_paths


def _checked_config(metadata: Metadata, facts: Facts) -> Any:
    """Return transformers' configuration, which checks values with exceptions of many kinds."""
    try:
        return read_config(metadata, facts)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"transformers rejects the configuration: {first_line(error)}") from None


def _parameter_shapes(config: Any) -> dict[str, Shape]:
    """Return the shapes of a model's parameters, of linear maps [out, in]."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(f"transformers cannot make such a model: {first_line(error)}") from None
    return {
        name: tuple(reversed(parameter.shape)) if is_inputs_first(config, name) else tuple(parameter.shape)
        for name, parameter in outline.named_parameters()
    }
