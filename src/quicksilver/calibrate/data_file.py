"""What was fitted, in one safetensors file, so that an interrupted calibration need not fit again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quicksilver.calibrate.bits import MapScores
from quicksilver.calibrate.candidates import CalibrationData
from quicksilver.calibrate.objectives import UnitCosts
from quicksilver.calibrate.sensitivity import AttentionPrices
from quicksilver.core.files import write_atomically
from quicksilver.families.spec import ModelSpec

_TENSOR, _COUNTS = "fitted.", "counts."


def write(path: Path, key: str, data: CalibrationData) -> None:
    """Write what was fitted; an interrupted write leaves nothing half-written.

    Args:
        path: of the file.
        key: of everything that the fits depend on.
        data: to be kept.
    """
    facts = {
        "units": asdict(data.units),
        "context": data.context,
        "halt_layers": data.halt_layers,
        "shortcuts": [[*unit, *known] for unit, known in data.shortcuts.items()],
        "maps": [[s.num_inputs, s.num_outputs, s.worth, s.lost] for s in data.map_scores],
        "map_weights": data.map_weights,
        "centred": data.centred,
        "attention": asdict(data.attention),
        "entry_nats": data.entry_nats,
    }
    tensors = {f"{_TENSOR}{name}": tensor.contiguous() for name, tensor in data.tensors.items()}
    tensors |= {f"{_COUNTS}{i}": scores.counts for i, scores in enumerate(data.map_scores)}
    tensors["none"] = torch.zeros(0)  # there may be nothing else
    write_atomically(path, save(tensors, metadata={"key": key, "facts": json.dumps(facts)}))


def read(path: Path, key: str, spec: ModelSpec) -> CalibrationData | None:
    """Return what was fitted under a key, None where the file is missing, damaged or of another key."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _decode(json.loads(metadata["facts"]), tensors, spec)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _decode(facts: dict[str, Any], tensors: dict[str, torch.Tensor], spec: ModelSpec) -> CalibrationData:
    return CalibrationData(
        spec,
        UnitCosts(**facts["units"]),
        facts["context"],
        {name.removeprefix(_TENSOR): t.to(spec.device) for name, t in tensors.items() if name.startswith(_TENSOR)},
        tuple(facts["halt_layers"]),
        {(layer, part): (weight, nats) for layer, part, weight, nats in facts["shortcuts"]},
        [
            MapScores(tensors[f"{_COUNTS}{i}"], inputs, outputs, worth, tuple(lost))
            for i, (inputs, outputs, worth, lost) in enumerate(facts["maps"])
        ],
        list(facts["map_weights"]),
        facts["centred"],
        AttentionPrices(tuple(map(tuple, facts["attention"]["points"])), tuple(facts["attention"]["layers"])),
        facts["entry_nats"],
    )
