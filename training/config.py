"""The training configuration: a TOML file read into frozen dataclasses.

A `[cuda]` or `[cpu]` table holds what differs on that device; nothing here builds models or touches devices.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from training.common import InputError


@dataclass(frozen=True)
class StageConfig:
    """One stretch of the run: up to the share `until` of the run, windows of `seq_len` tokens."""

    until: float
    seq_len: int
    batch_tokens: int
    micro_tokens: int = 0  # tokens per forward pass; 0: the whole batch at once


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases; or AdamW for all."""

    hidden: str = "muon"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    adam_lr: float = 0.003
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_weight_decay: float = 0.0
    grad_clip: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate factor: warm-up in steps, plateau, then `decay` to `final` by share of the run."""

    warmup_steps: int = 50
    decay: str = "linear"
    decay_from: float = 0.4
    final: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything one run needs besides data and output folders."""

    architecture: str
    model: dict[str, Any]
    stages: tuple[StageConfig, ...]
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    steps: int = 0  # length of the run in steps; 0: a time limit must be given
    seed: int = 0
    precision: str = "bf16"
    compile: bool = False
    token_dropout: float = 0.0  # share of input tokens replaced by random ones while training
    log_every: int = 20
    eval_every: int = 200
    eval_tokens: int = 65536
    checkpoint_seconds: float = 300.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint and the log."""
        return asdict(self)


def _build(cls: type, table: dict[str, Any], where: str) -> Any:
    known = {item.name for item in fields(cls)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise InputError(f"{where}: unknown key {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    try:
        return cls(**table)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _check(config: TrainConfig, path: Path) -> None:
    ends = [stage.until for stage in config.stages]
    if not ends or ends != sorted(ends) or ends[-1] != 1.0:
        raise InputError(f"{path}: the stages' `until` must rise to 1.0")
    if config.architecture not in ("llama", "gpt2"):
        raise InputError(f"{path}: architecture must be llama or gpt2, not {config.architecture!r}")
    if config.precision not in ("bf16", "fp32"):
        raise InputError(f"{path}: precision must be bf16 or fp32, not {config.precision!r}")
    if config.optim.hidden not in ("muon", "adamw"):
        raise InputError(f"{path}: optim.hidden must be muon or adamw, not {config.optim.hidden!r}")
    if config.schedule.decay not in ("linear", "cosine"):
        raise InputError(f"{path}: schedule.decay must be linear or cosine, not {config.schedule.decay!r}")
    for stage in config.stages:
        micro = stage.micro_tokens or stage.batch_tokens
        if stage.batch_tokens % micro or micro % stage.seq_len:
            raise InputError(f"{path}: batch_tokens, micro_tokens and seq_len must divide one another: {stage}")


def load_config(path: Path, device: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a TOML file, laying the table named after the device, then `overrides`, over the rest.

    Raises:
        InputError: the file is missing, is not TOML, or has unknown or inconsistent keys.
    """
    if not path.is_file():
        raise InputError(f"no such configuration file: {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    devices = {name: table.pop(name, {}) for name in ("cuda", "cpu")}
    table = _merge(_merge(table, devices.get(device, {})), overrides or {})
    stages = tuple(_build(StageConfig, item, f"{path} [[stages]]") for item in table.pop("stages", []))
    optim = dict(table.pop("optim", {}))
    if "adam_betas" in optim:
        optim["adam_betas"] = tuple(optim["adam_betas"])
    table["stages"] = stages
    table["optim"] = _build(OptimConfig, optim, f"{path} [optim]")
    table["schedule"] = _build(ScheduleConfig, table.pop("schedule", {}), f"{path} [schedule]")
    config = _build(TrainConfig, table, str(path))
    _check(config, path)
    return config
