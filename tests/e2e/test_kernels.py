"""`--kernels`: the same figures with compiled kernels and without, and what is said where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quicksilver
from quicksilver.errors import InputError
from quicksilver.families import kernels
from quicksilver.loading.quantized import save_quantized
from quicksilver.ops import native
from tests import tiny, tolerances
from tests.e2e.conftest import CUT, Outcome, run_process

Cli = Callable[..., Outcome]
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized Llama with its tokenizer."""
    save_quantized(tiny.quantized("llama"), tmp_path / "quantized", tiny.tokenizer())
    return tmp_path / "quantized"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extension."""
    monkeypatch.setattr(native, "_load", lambda: (None, "this installation has no compiled kernels (gone)"))
    monkeypatch.delenv(native.CHOICE_VARIABLE, raising=False)
    kernels._warn_once.cache_clear()


def evaluate(cli: Cli, folder: Path, text_file: Path, choice: str) -> dict[str, Any]:
    out = folder.parent / f"{choice}.json"
    options = ("--plan", "uniform-4bit", "--mode", "decode", "--kernels", choice, "--json", out)
    outcome = cli("eval", folder, "--text", text_file, *CUT, *options)
    assert outcome.status == 0, outcome.err
    return json.loads(out.read_text())[0]


@needs_kernels
def test_eval_gives_the_same_perplexity(cli: Cli, folder: Path, text_file: Path) -> None:
    by_torch, by_kernels = (evaluate(cli, folder, text_file, choice) for choice in ("torch", "native"))
    for side in ("dense", "accelerated"):
        assert by_kernels[side]["nll"] == pytest.approx(by_torch[side]["nll"], abs=tolerances.KERNEL_LOSS)
        assert by_kernels[side]["nll"] != by_torch[side]["nll"]
        assert by_kernels[side]["weight_bytes_per_token"] == by_torch[side]["weight_bytes_per_token"]
    said = [(each["settings"]["kernels"], each["settings"]["instruction_set"]) for each in (by_torch, by_kernels)]
    assert said == [("torch", None), ("native", native.instruction_set())]


@needs_kernels
def test_generate_gives_the_same_text(cli: Cli, folder: Path) -> None:
    texts = [
        cli("generate", folder, "The river", "--max-new-tokens", 8, "--kernels", choice).out
        for choice in ("torch", "native")
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.usefixtures("missing")
def test_without_kernels_auto_says_so_once_and_native_is_refused(
    cli: Cli, refused: Callable[..., str], folder: Path, text_file: Path
) -> None:
    outcome = cli("generate", folder, "The river", "--max-new-tokens", 2)
    assert outcome.status == 0
    (note,) = outcome.said
    assert note.startswith("quicksilver: note: PyTorch reads any-precision weights here, slowly: this installation has")
    for model in (folder, "ref-llama"):
        names = ("this installation has no compiled kernels",)
        refused("eval", model, "--text", text_file, *CUT, "--kernels", "native", names=names)


@needs_kernels
def test_native_is_refused_where_nothing_is_quantized(refused: Callable[..., str], text_file: Path) -> None:
    for arguments in (("eval", "ref-llama", "--text", text_file, *CUT), ("generate", "ref-llama", "The river")):
        refused(*arguments, "--kernels", "native", names=("--kernels native", "ref-llama", "not quantized"))
    assert quicksilver.load("ref-llama", kernels="native").adapter.kernels == "torch"


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_refused(folder: Path) -> None:
    outcome = run_process("generate", folder, "The river", "--max-new-tokens", 2, QUICKSILVER_ISA="mmx")
    assert outcome.status == 2
    assert outcome.said[0].startswith("quicksilver: error: QUICKSILVER_ISA 'mmx' is not available here; there are ")
    assert len(outcome.said) == 1


@needs_kernels
def test_the_environment_can_switch_them_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE_VARIABLE, "torch")
    assert quicksilver.load(folder).adapter.kernels == "torch"
    monkeypatch.delenv(native.CHOICE_VARIABLE)
    model = quicksilver.load(folder)
    assert model.adapter.kernels == "native"
    assert model.bfloat16().adapter.kernels == "torch"
    assert model.float().adapter.kernels == "native"
    with pytest.raises(InputError, match="kernels must be one of"):
        quicksilver.load(folder, kernels="fast")  # type: ignore[arg-type]
