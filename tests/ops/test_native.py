"""Which kernels are used: what was asked for, what is there, and what is said where the two differ."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from quicksilver.errors import InputError, KernelsMissingWarning, KernelsUnavailableError
from quicksilver.families import kernels
from quicksilver.families.registry import adapt
from quicksilver.loading.load import accelerate, load
from quicksilver.ops import native
from tests import tiny

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extension."""
    monkeypatch.setattr(native, "_load", lambda: (None, "this installation has no compiled kernels (gone)"))
    monkeypatch.delenv(native.CHOICE_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def unsaid() -> None:
    """Let what is said once be said again."""
    kernels._warn_once.cache_clear()


def test_choices_and_what_the_environment_makes_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.CHOICE_VARIABLE, raising=False)
    assert [native.check_choice(choice) for choice in ("auto", "native", "torch")] == ["auto", "native", "torch"]
    with pytest.raises(InputError, match="kernels must be one of auto, native, torch, got 'fast'"):
        native.check_choice("fast")
    monkeypatch.setenv(native.CHOICE_VARIABLE, "torch")
    assert native.check_choice("auto") == "torch"
    assert native.check_choice("native") == "native"
    monkeypatch.setenv(native.CHOICE_VARIABLE, "fast")
    with pytest.raises(InputError, match="QUICKSILVER_KERNELS must be one of"):
        native.check_choice("auto")


@needs_kernels
def test_kernels_read_quantized_models_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.CHOICE_VARIABLE, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelsMissingWarning)
        assert adapt(tiny.quantized("llama")).kernels == "native"
        assert adapt(tiny.quantized("llama"), "torch").kernels == "torch"
        assert adapt(tiny.model("llama")).kernels == "torch"
        assert adapt(tiny.model("llama"), "native").kernels == "torch"
    model = accelerate(tiny.quantized("gpt2"), kernels="torch")
    assert (model.kernels, model.adapter.kernels) == ("torch", "torch")


@needs_kernels
def test_other_types_are_said_once_and_refused_where_kernels_were_asked_for() -> None:
    model = tiny.quantized("llama", torch.float64)
    with pytest.raises(KernelsUnavailableError, match=r"they read float32 on the CPU.*float64 on cpu"):
        adapt(model, "native")
    with pytest.warns(KernelsMissingWarning, match="float64"):
        assert adapt(model).kernels == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapt(model).kernels == "torch"


@pytest.mark.usefixtures("missing")
def test_a_pure_python_installation_works_and_says_once_what_it_lacks() -> None:
    assert not native.is_available()
    with pytest.warns(KernelsMissingWarning, match="no compiled kernels"):
        assert adapt(tiny.quantized("llama")).kernels == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapt(tiny.quantized("gpt2")).kernels == "torch"
        assert adapt(tiny.quantized("llama"), "torch").kernels == "torch"
        assert adapt(tiny.model("llama")).kernels == "torch"
    for asked in (lambda: adapt(tiny.model("llama"), "native"), lambda: load("ref-llama", kernels="native")):
        with pytest.raises(KernelsUnavailableError, match="no compiled kernels"):
            asked()
    with pytest.raises(KernelsUnavailableError, match="no compiled kernels"):
        native.instruction_sets()


@needs_kernels
def test_instruction_sets() -> None:
    known, before = native.instruction_sets(), native.instruction_set()
    assert before in known
    assert known[-1] == "portable"
    with pytest.raises(KernelsUnavailableError, match="instruction set 'mmx' is not available here; there are"):
        native.use_instruction_set("mmx")
    assert native.instruction_set() == before


@needs_kernels
@pytest.mark.parametrize(
    ("wanted", "status", "says"), [("portable", 0, "portable"), ("mmx", 1, "QUICKSILVER_ISA 'mmx'")]
)
def test_the_environment_names_an_instruction_set(wanted: str, status: int, says: str) -> None:
    code = "from quicksilver.ops import native; print(native.instruction_set())"
    environment = {**os.environ, native.ISA_VARIABLE: wanted}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status
    assert says in done.stdout + done.stderr
