"""What was fitted, in one file, so that an interrupted calibration need not fit again."""

import io
from dataclasses import replace
from pathlib import Path

import torch

from quicksilver.calibrate.bits import MapScores
from quicksilver.calibrate.candidates import CalibrationData
from quicksilver.calibrate.objectives import UnitCosts
from quicksilver.calibrate.sensitivity import AttentionPrices
from quicksilver.core.files import write_atomically
from quicksilver.families.spec import ModelSpec


def write(path: Path, key: str, data: CalibrationData) -> None:
    """Write what was fitted, under a key of everything that it depends on; an interrupted write leaves nothing."""
    content = io.BytesIO()
    torch.save({"key": key, "data": replace(data, spec=None)}, content)  # type: ignore[arg-type]  # the model knows
    write_atomically(path, content.getvalue())


def read(path: Path, key: str, spec: ModelSpec) -> CalibrationData | None:
    """Return what was fitted under a key, None where the file is missing, damaged or of another key."""
    try:
        with torch.serialization.safe_globals([CalibrationData, UnitCosts, MapScores, AttentionPrices]):
            kept = torch.load(path, "cpu", weights_only=True)
    except Exception:  # a damaged file raises whatever its first wrong byte leads to
        return None
    if kept["key"] != key:
        return None
    tensors = {name: tensor.to(spec.device) for name, tensor in kept["data"].tensors.items()}
    return replace(kept["data"], spec=spec, tensors=tensors)
