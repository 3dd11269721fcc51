"""Weights quantized and written map by map: the same files as from memory, and never more than one map of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quicksilver.families.quantize import quantized_names
from quicksilver.loading.load import load_plain
from quicksilver.loading.quantized import quantize_and_save, save_quantized
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.config import QuantizationConfig
from quicksilver.weights.rounding import quantize
from tests import tiny
from tests.e2e.conftest import assert_refusal
from tests.e2e.test_quantize import ALL, NAMES, NONE, Cli, ModelCopy, quantized

OPTIONS = ([], ["--keep-head"], ["--group-size", "64"])
BEYOND = 3e38 * (torch.arange(48) % 2 * 2.0 - 1.0)
"""Weights of one channel: each is in the range of float32, and what lies between them is not."""


@pytest.mark.parametrize(("name", "options"), tiny.on_telling(OPTIONS, OPTIONS[:1], NAMES), ids=str)
def test_a_model_written_map_by_map_is_the_one_quantized_in_memory(
    cli: Cli, tmp_path: Path, name: str, options: list[str]
) -> None:
    dtypes = [torch.float32]
    if not options and name in tiny.TELLING:
        dtypes += [torch.bfloat16, torch.float16]
    chosen = NONE if "--keep-head" in options else ALL
    size = 64 if "--group-size" in options else 32
    for dtype in dtypes:
        source, made, expected = (tmp_path / f"{kind} {dtype}" for kind in ("plain", "made", "expected"))
        copy.deepcopy(tiny.model(name)).to(dtype).save_pretrained(source, max_shard_size="20KB")
        outcome = cli("quantize", source, "-o", made, *options)
        assert outcome.status == 0, outcome.err
        save_quantized(quantized(name, dtype, group_size=size, **chosen), expected)
        tensors, wanted = (load_file(folder / "model.safetensors") for folder in (made, expected))
        assert tensors.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor), key
        for file in ("config.json", "generation_config.json"):
            assert (made / file).read_text() == (expected / file).read_text()


def test_the_codes_of_one_map_are_in_memory_at_a_time(
    cli: Cli, tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(each() is not None for each in made))
        codes = quantize(*args, **kwargs)
        made.append(weakref.ref(codes.codes))
        return codes

    monkeypatch.setattr("quicksilver.families.quantize.quantize", watched)
    assert cli("quantize", tiny_model_dir("llama"), "-o", tmp_path / "out").status == 0
    assert len(alive) == 4 * 7 + 2
    assert max(alive) <= 1


def test_shards_written_map_by_map_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    tiny.model("gpt2").save_pretrained(tmp_path / "plain")
    model, config = load_plain(tmp_path / "plain"), QuantizationConfig(**ALL)
    counted: list[int] = []
    quantize_and_save(model, config, tmp_path / "made", max_shard_size="20KB", on_map=lambda: counted.append(1))
    assert len(counted) == len(quantized_names(tiny.model("gpt2"), config)) == 4 * 4 + 1
    assert all(
        tensor.is_meta for part in model.modules() if isinstance(part, AnyPrecisionLinear) for tensor in part.buffers()
    )
    save_quantized(quantized("gpt2", **ALL), tmp_path / "expected", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == names
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "model.norm.weight"),
        (lambda tensors: tensors["model.embed_tokens.weight"][3:4].fill_(float("inf")), "embed_tokens.weight"),
        (lambda tensors: tensors["model.layers.3.mlp.down_proj.weight"][:1].copy_(BEYOND), "range of float32"),
        (lambda tensors: tensors.pop("model.layers.3.mlp.down_proj.weight"), "model.layers.3.mlp.down_proj.weight"),
    ],
    ids=["norm", "embedding", "range", "missing"],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    cli: Cli,
    model_copy: ModelCopy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[Any], Any],
    message: str,
) -> None:
    folder = model_copy("llama").edit_weights(edit)
    monkeypatch.setattr("quicksilver.loading.quantized.TensorWriter.write", None)
    assert_refusal(cli("quantize", folder, "-o", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
