"""Fixtures: tiny seeded models of every family, a tokenizer, and the shared data where it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import rounding, tiny

torch.set_num_threads(1)  # tiny models run fastest on one thread
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture
def rounding_as_kernels() -> Iterator[None]:
    """PyTorch's products of quantized maps, activations rounded as the kernels round them."""
    with rounding.rounding_as_kernels():
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared texts and small real models; tests that need it are skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip("../shared is not there: real models and texts are not tested")
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family to the folder of a tiny saved model with its tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            tiny.model(family).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make
