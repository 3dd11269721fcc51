"""What GPTQ and AWQ folders say about themselves: every tool's names are known, and what contradicts is refused."""

from __future__ import annotations

from typing import Any

import pytest

from quicksilver.errors import ModelError, UnsupportedModelError
from quicksilver.weights.packed_settings import PackedSettings, method_of

CONFIG, GPTQ_FILE, AWQ_FILE = "a/config.json", "a/quantize_config.json", "a/quant_config.json"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64}


def read(*given: dict[str, Any], **files: dict[str, Any]) -> PackedSettings:
    return PackedSettings.read({**dict(zip((CONFIG, GPTQ_FILE), given, strict=False)), **files})


def refusal(*given: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as refused:
        read(*given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("file", "stated"),
    [
        (CONFIG, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
        (
            CONFIG,
            {"quant_method": "AWQ", "bits": 4, "group_size": 64, "format": "GEMM", "sym": True, "zero_point": True},
        ),
        (CONFIG, {"method": "awq", "wbits": 4, "q_group_size": 64, "checkpoint_format": "gemm", "sym": False}),
        (AWQ_FILE, {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}),
    ],
)
def test_every_tools_names_for_awq(file: str, stated: dict[str, Any]) -> None:
    found = PackedSettings.read({file: stated})
    assert (found.method, found.bits, found.group_size, found.symmetric) == ("awq", 4, 64, False)
    assert (found.source, found.zero_offset, found.ordered) == (file, 0, False)


@pytest.mark.parametrize(
    ("file", "stated", "offset"),
    [
        (CONFIG, {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, 1),
        (CONFIG, {"method": "gptq", "quant_method": "gptq", "bits": 8, "group_size": -1, "format": "gptq"}, 1),
        (CONFIG, {"quant_method": "GPTQ", "bits": 8, "group_size": -1, "checkpoint_format": "GPTQ_V2"}, 0),
        (GPTQ_FILE, {"bits": 8, "group_size": -1, "desc_act": False, "sym": True, "model_name_or_path": None}, 1),
        (GPTQ_FILE, {"wbits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}, 0),
    ],
)
def test_every_tools_names_for_gptq(file: str, stated: dict[str, Any], offset: int) -> None:
    found = PackedSettings.read({file: stated})
    assert (found.method, found.bits, found.group_size, found.zero_offset) == ("gptq", 8, -1, offset)
    assert found.symmetric == stated.get("sym", True)


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "'gptq_p'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "format": "bitblas"}, "'bitblas'"),
        ({**GPTQ, "is_marlin_format": True}, "'marlin'"),
        ({**GPTQ, "format": "exllama"}, "'exllama'"),
        ({**GPTQ, "format": "gemm"}, "'gemm'"),
        ({**AWQ, "version": "gemv"}, "'gemv'"),
        ({**AWQ, "version": "GEMV_fast"}, "'gemv_fast'"),
        ({**AWQ, "version": "marlin"}, "'marlin'"),
        ({**AWQ, "version": "exllama"}, "'exllama'"),
        ({**AWQ, "version": "gemm", "backend": "llm-awq"}, "'llm-awq'"),
        ({**AWQ, "zero_point": False}, "zero_point"),
        ({**AWQ, "sym": True}, "zero_point"),
        ({**AWQ, "bits": 8}, "8 bits"),
        ({**GPTQ, "bits": 5}, "5 bits"),
        ({**GPTQ, "quant_method": "auto-round"}, "'auto-round'"),
        ({**GPTQ, "quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({**GPTQ, "quant_method": None}, "no quant_method"),
        ({**GPTQ, "quant_method": ["gptq"]}, "gptq"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(stated: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        read(stated)
    assert str(refused.value).startswith(f"{CONFIG}: ")
    assert name in str(refused.value)


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "group_size"),
        ({"quant_method": "awq", "group_size": 32}, "bits"),
        ({**GPTQ, "bits": "4"}, "bits"),
        ({**GPTQ, "bits": 4.0}, "bits"),
        ({**GPTQ, "bits": True}, "bits"),
        ({**GPTQ, "group_size": 0}, "group_size"),
        ({**GPTQ, "group_size": -2}, "group_size"),
        ({**GPTQ, "sym": "yes"}, "sym"),
        ({**GPTQ, "desc_act": 1}, "desc_act"),
        ({**GPTQ, "w_bit": 8}, "w_bit"),
        ({**GPTQ, "method": "awq"}, "method"),
        ({**GPTQ, "format": "gptq", "checkpoint_format": "gptq_v2"}, "format"),
        ({**GPTQ, "dynamic": ["a"]}, "dynamic"),
        ({**GPTQ, "dynamic": {"(": {}}}, "dynamic '('"),
        ({**GPTQ, "dynamic": {"a": 4}}, "dynamic 'a'"),
        ({**GPTQ, "dynamic": {"a": {"bits": 7}}}, "dynamic 'a'"),
        ({**GPTQ, "dynamic": {"a": {"format": "gptq_v2"}}}, "dynamic 'a'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(stated: dict[str, Any], name: str) -> None:
    line = refusal(stated)
    assert line.startswith(f"{CONFIG}: ")
    assert name in line


@pytest.mark.parametrize(
    ("key", "stated"),
    [
        ("bits", {"w_bit": 8}),
        ("group_size", {"group_size": 32}),
        ("method", {"quant_method": "awq"}),
        ("sym", {"sym": False}),
        ("format", {"checkpoint_format": "gptq_v2"}),
    ],
)
def test_files_that_contradict_each_other_are_refused(key: str, stated: dict[str, Any]) -> None:
    line = refusal({**GPTQ, "sym": True, "checkpoint_format": "gptq"}, stated)
    assert line.startswith(f"{CONFIG}: {key} is ")
    assert GPTQ_FILE in line


def test_config_json_comes_first_and_the_other_file_fills_in() -> None:
    found = read({**GPTQ, "desc_act": True}, {"bits": 4, "sym": False, "desc_act": False, "format": "gptq_v2"})
    assert (found.source, found.zero_offset, found.symmetric, found.ordered) == (CONFIG, 0, False, True)


@pytest.mark.parametrize(
    ("meta", "borrows"),
    [
        (None, False),
        ({}, False),
        ({"quantizer": "gptqmodel:0.9.0"}, True),
        ({"quantizer": ["gptqmodel:0.8.5"]}, False),
        ({"quantizer": ["optimum:1.9", "GPTQModel:1.4.2-dev"]}, True),
        ({"quantizer": ["optimum:1.9"]}, False),
        ({"quantizer": [None, 3]}, False),
        ("gptqmodel:2.0", False),
    ],
    ids=str,
)
def test_who_subtracted_from_whole_words(meta: Any, borrows: bool) -> None:
    assert read({**GPTQ, "meta": meta}).borrows == borrows


def test_maps_with_settings_of_their_own_are_told_by_the_first_pattern_from_the_beginning() -> None:
    dynamic = {
        r"-:.*\.v_proj": {},
        r"+:model\.layers\.0\.": {"bits": 8, "sym": False},
        r"layers\.1": {"bits": 2},
        r".*\.down_proj$": {"group_size": 32, "desc_act": True, "mse": 2.0},
        r".*": {},
    }
    found = read({**GPTQ, "dynamic": dynamic})

    def own(name: str) -> tuple[int, int, bool, bool]:
        settings = found.of(name)
        return settings.bits, settings.group_size, settings.symmetric, settings.ordered

    assert own("model.layers.0.self_attn.v_proj") == (4, 128, True, False)
    assert own("model.layers.0.mlp.down_proj") == (8, 128, False, False)
    assert own("model.layers.1.mlp.down_proj") == (4, 32, True, True)
    assert own("model.layers.1.mlp.up_proj") == (4, 128, True, False)


@pytest.mark.parametrize(
    ("stated", "method"),
    [({"quant_method": "GPTQ"}, "gptq"), ({"method": "awq"}, "awq"), ({}, None), ({"quant_method": 3}, None)],
)
def test_the_method_that_is_named(stated: dict[str, Any], method: str | None) -> None:
    assert method_of(stated) == method
