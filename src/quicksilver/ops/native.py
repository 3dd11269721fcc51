"""The compiled kernels: whether this installation has them, whether they are wanted, which instructions they use."""

import importlib
import os
from functools import cache
from typing import Any, Literal, get_args

from quicksilver.errors import InputError, KernelsUnavailableError

KernelChoice = Literal["auto", "native", "torch"]
"""What a user may ask for: the compiled kernels where they can be used, these or nothing, or PyTorch's own."""

Kernels = Literal["native", "torch"]
"""What a choice comes to."""

CHOICE_VARIABLE = "QUICKSILVER_KERNELS"
"""Environment variable that says what "auto" stands for."""

ISA_VARIABLE = "QUICKSILVER_ISA"
"""Environment variable that names the instruction set to use, instead of the best one."""


def check_choice(choice: str, source: str = "kernels") -> KernelChoice:
    """Return a choice, "auto" replaced by what the environment says; InputError, with its source, where it is none."""
    if choice not in get_args(KernelChoice):
        raise InputError(f"{source} must be one of {', '.join(get_args(KernelChoice))}, got {choice!r}")
    if choice == "auto" and source == "kernels" and (wanted := os.environ.get(CHOICE_VARIABLE)):
        return check_choice(wanted, CHOICE_VARIABLE)
    return choice  # type: ignore[return-value]


def is_available() -> bool:
    """Whether the compiled kernels can be used in this process."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Return why the compiled kernels cannot be used in this process, None where they can."""
    return _load()[1]


def extension() -> Any:
    """Return the compiled module; KernelsUnavailableError without it, or the instruction set the environment names."""
    module, problem = _load()
    if problem is not None:
        raise KernelsUnavailableError(problem)
    return module


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the kernels have on this processor, best first."""
    return tuple(extension().instruction_sets())


def instruction_set() -> str:
    return extension().instruction_set()


def use_instruction_set(name: str) -> None:
    """Use an instruction set from now on, for the same bits; KernelsUnavailableError where it is not there."""
    _use(extension(), name, "instruction set")


@cache
def _load() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("quicksilver.ops._native")
    except ImportError as error:
        return None, (
            f"this installation has no compiled kernels ({error}); reinstall the package where there is a C++ compiler"
        )
    if wanted := os.environ.get(ISA_VARIABLE):
        _use(module, wanted, ISA_VARIABLE)
    return module, None


def _use(module: Any, name: str, source: str) -> None:
    known = module.instruction_sets()
    if name not in known:
        raise KernelsUnavailableError(f"{source} {name!r} is not available here; there are {', '.join(known)}")
    module.use_instruction_set(name)
