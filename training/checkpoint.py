"""Checkpoints: a folder per step with weights, optimiser state (both safetensors) and progress (JSON).

No pickles, so a checkpoint from elsewhere cannot run code. Exporting to Hugging Face form is `export.py`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from training.common import InputError

KEPT = 2


@dataclass
class Progress:
    """How far a run is: steps and tokens done, seconds spent in all its sittings."""

    step: int = 0
    tokens_seen: int = 0
    elapsed: float = 0.0


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights once each: tied copies are left out."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Flatten the optimisers' states to names like `0.17.momentum_buffer`."""
    return {
        f"{number}.{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Put flattened states back into freshly built optimisers."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    out: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    facts: dict[str, Any],
) -> Path:
    """Write `out/step-NNNNNNNN`, complete or not at all, and drop all but the newest few."""
    folder = out / f"step-{progress.step:08d}"
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(model_tensors(model), temporary / "model.safetensors")
    save_file(optimizer_tensors(optimizers), temporary / "optimizer.safetensors")
    content = json.dumps({"progress": asdict(progress), **facts}, indent=1)
    (temporary / "state.json").write_text(content + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in list_checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints in `out`, oldest first."""
    return sorted(path for path in out.glob("step-*") if path.suffix == "" and (path / "state.json").is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is not a checkpoint: {error}") from error


def load_model(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model of the same shape."""
    try:
        tensors = load_file(folder / "model.safetensors")
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"cannot load the weights in {folder}: {error}") from error
    tied = set(model.state_dict()) - set(model_tensors(model))
    if unexpected or set(missing) - tied:
        raise InputError(f"the weights in {folder} are of another model")


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Load weights and optimiser states in place; returns the progress made."""
    load_model(folder, model)
    restore_optimizers(optimizers, load_file(folder / "optimizer.safetensors"))
    return Progress(**read_state(folder)["progress"])
