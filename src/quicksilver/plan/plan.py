"""The plan: what each mechanism may do, as one immutable, hashable, versioned value.

Reading and writing files is here; deciding anything about tokens is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quicksilver.core.files import write_atomically
from quicksilver.errors import PlanError
from quicksilver.plan import codec
from quicksilver.plan.provenance import FittedTo
from quicksilver.plan.tensors import PlanTensors, named_vector
from quicksilver.rules import (
    AllRule,
    AttentionConfig,
    ChannelWidthRule,
    CosineFusionRule,
    DriftRule,
    DropFill,
    EntropyRule,
    EntryConfig,
    FusionConfig,
    HaltingConfig,
    KVFill,
    MapConfig,
    PrecisionConfig,
    PropagateFill,
    RelativeDriftRule,
    ScreeningConfig,
    Shortcut,
    ShortcutConfig,
    UniformWidthRule,
    ZeroFill,
)
from quicksilver.rules.checks import check_parts

if TYPE_CHECKING:
    from torch import Tensor

    from quicksilver.plan.affine import AffineMap

PLAN_VERSION = 1

_DECODERS: dict[str, Callable[[object, str], Any]] = {
    "halting": codec.decode_halting,
    "kv": codec.decode_fill,
    "fusion": codec.decode_fusion,
    "precision": codec.decode_precision,
    "maps": codec.decode_maps,
    "shortcuts": codec.decode_shortcuts,
    "attention": codec.decode_attention,
    "screening": codec.decode_screening,
    "entries": codec.decode_entries,
}
"""Of each part of a plan, from its JSON value and what names the plan in errors."""


@dataclass(frozen=True)
class Plan:
    """What a run may save and how. `Plan.dense()` changes nothing.

    Attributes:
        name: a label for tables; not part of the hash.
        halting: which tokens stop early, or None for none.
        kv: what fills the deeper keys and values of a halted token.
        fusion: which adjacent tokens become one, or None for none.
        precision: how many bits of nested weights are read, or None for all.
        maps: where fitted maps to the last layer's state are used, or None for nowhere.
        shortcuts: which sublayers fitted maps stand in for, or None for none.
        attention: which values and components of queries attention does not read, or None where it reads all.
        screening: which keys meet a query with its large components alone, or None where all meet the whole of it.
        entries: in how many bits keys and values are kept, or None for the model's own.
        tensors: what was fitted, or None for nothing.
        fitted_to: the model that thresholds and tensors were fitted to, or None where that is not known; not part of
            the hash, which is of what the plan does.
    """

    name: str = "plan"
    halting: HaltingConfig | None = None
    kv: KVFill = field(default_factory=DropFill)
    fusion: FusionConfig | None = None
    precision: PrecisionConfig | None = None
    maps: MapConfig | None = None
    shortcuts: ShortcutConfig | None = None
    attention: AttentionConfig | None = None
    screening: ScreeningConfig | None = None
    entries: EntryConfig | None = None
    tensors: PlanTensors | None = None
    fitted_to: FittedTo | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PlanError(f"a plan's name must be a string, got {repr(self.name)[:40]}; it is the first argument")
        check_parts(self, f"plan {self.name!r}", ": ")

    @classmethod
    def dense(cls) -> Plan:
        """Return the plan with every mechanism off; equal to the model as published."""
        return cls(name="dense")

    @classmethod
    def preset(cls, name: str) -> Plan:
        """Return a preset by name.

        Raises:
            PlanError: no preset has that name.
        """
        try:
            return PRESETS[name]
        except KeyError:
            known = ", ".join(PRESETS)
            raise PlanError(f"no preset plan is called {name!r}; presets: {known}") from None

    @classmethod
    def from_dict(cls, data: object, source: str = "plan", tensors: PlanTensors | None = None) -> Plan:
        """Build a plan from decoded JSON.

        Args:
            data: the JSON object.
            source: names it in errors.
            tensors: what was fitted, where the plan refers to that.

        Raises:
            PlanError: unknown version, key, type or value; other tensors than the plan's.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{source}: a plan is a JSON object, got {type(data).__name__}")
        data = dict(data)
        if "version" not in data:
            raise PlanError(f'{source}: version is missing: a plan says "version": {PLAN_VERSION}')
        version = data.pop("version")
        if version != PLAN_VERSION:
            raise PlanError(f"{source}: plan version {version!r} is not supported (this is {PLAN_VERSION})")
        declared_hash = data.pop("hash", None)
        parts = {key: data.pop(key, None) for key in _DECODERS}
        declared = data.pop("tensors", None)
        _check_tensors(declared, tensors, source)
        fitted_to = data.pop("fitted_to", None)
        name = data.pop("name", "plan")
        if data:
            raise PlanError(f"{source}: unknown key {next(iter(data))!r}")
        if not isinstance(name, str):
            raise PlanError(f"{source}: name must be a string, got {name!r}")
        plan = cls(
            name=name,
            **{key: _DECODERS[key](part, source) for key, part in parts.items() if part is not None},
            tensors=tensors,
            fitted_to=None if fitted_to is None else codec.decode_fitted_to(fitted_to, source),
        )
        if declared_hash is not None and declared_hash != plan.hash:
            raise PlanError(
                f"{source}: hash {declared_hash!r} does not match the contents ({plan.hash}); if they were changed on"
                ' purpose, take "hash" out of the file'
            )
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a JSON file, and its tensors from the file beside it that it names.

        Raises:
            PlanError: the file is missing, unreadable, or not a valid plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # a byte order mark is let be
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a JSON plan: {error}") from None
        return cls.from_dict(data, str(path), _load_tensors(data, Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, with its version and hash."""
        record = {} if self.fitted_to is None else {"fitted_to": codec.encode_fields(self.fitted_to)}
        return {"version": PLAN_VERSION, "name": self.name, **self._body(), **record, "hash": self.hash}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, its tensors beside it first; no interruption leaves a file half-written."""
        path, data = Path(path), self.to_dict()
        if self.tensors is not None:
            beside = path.with_suffix(".safetensors")
            data["tensors"] = {"file": beside.name, **data["tensors"]}
            self.tensors.save(beside)
        write_atomically(path, json.dumps(data, indent=2) + "\n")

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over what the plan does; neither its name nor `fitted_to` counts."""
        text = json.dumps({"version": PLAN_VERSION, **self._body()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def entry_bits(self) -> int | None:
        """In how many bits numbers of keys and values are kept, None for the model's own."""
        return None if self.entries is None else self.entries.bits

    @property
    def is_dense(self) -> bool:
        """Whether every mechanism is off."""
        mechanisms = (
            self.halting,
            self.fusion,
            self.precision,
            self.shortcuts,
            self.attention,
            self.screening,
            self.entries,
        )
        return all(each is None for each in mechanisms)

    @property
    def is_recipe(self) -> bool:
        """Whether thresholds are still to be fitted to a model before the plan can run."""
        return self.precision is not None and not self.precision.rule.is_fitted

    def renamed(self, name: str) -> Plan:
        """Return the same plan under another label."""
        return replace(self, name=name)

    def check_model(self, num_layers: int, num_maps: int, hidden_size: int) -> None:
        """Raise PlanError where the plan does not fit a model.

        Args:
            num_layers: its layers.
            num_maps: nested linear maps of each; 0 where its weights are plain.
            hidden_size: of its states.
        """
        try:
            if self.halting is not None:
                self.halting.check_depth(num_layers)
            if self.fusion is not None:
                self.fusion.after_layers(num_layers)
            if self.precision is not None:
                self._check_precision(self.precision, num_layers, num_maps)
            if self.shortcuts is not None:
                self.shortcuts.check_depth(num_layers)
            for config in (self.attention, self.screening):
                if config is not None:
                    config.check_depth(num_layers)
            self.fitted_maps(num_layers, hidden_size)
            self.shortcut_gates(hidden_size)
            self.fitted_gates(num_layers, hidden_size)
        except PlanError as error:
            whose = "" if self.fitted_to is None else f"; the plan was fitted to {self.fitted_to.model}"
            raise PlanError(f"plan {self.name!r}: {error}{whose}") from None

    def fitted_maps(self, num_layers: int, hidden_size: int) -> dict[str, AffineMap]:
        """Return the fitted maps that the plan uses, by name: `output.LAYER`, and each shortcut's.

        Every layer after which a token may halt has an output map; a layer after which tokens only fuse may have one.

        Raises:
            PlanError: tensors are missing or of another model's shape.
        """
        from quicksilver.plan.affine import AffineMap

        tensors = self.tensors or {}
        names = [shortcut.name for shortcut in self.shortcuts.shortcuts] if self.shortcuts is not None else []
        if self.maps is not None and self.maps.output:
            names += [f"output.{i}" for i in self._halt_layers(num_layers)]
        if self.maps is not None and self.maps.output and self.fusion is not None:
            fusing = [f"output.{i}" for i in self.fusion.after_layers(num_layers)]
            names += [name for name in fusing if any(key.startswith(f"{name}.") for key in tensors)]
        return {name: AffineMap.named(tensors, name, hidden_size) for name in names}

    def shortcut_gates(self, hidden_size: int) -> dict[Shortcut, Tensor]:
        """Return the fitted gates of the shortcuts that ask one, each [hidden_size + 2].

        Raises:
            PlanError: tensors are missing or of another model's shape.
        """
        shortcuts = () if self.shortcuts is None else self.shortcuts.shortcuts
        return {
            shortcut: named_vector(self.tensors or {}, f"{shortcut.name}.gate", hidden_size + 2)
            for shortcut in shortcuts
            if shortcut.threshold is not None
        }

    def fitted_gates(self, num_layers: int, hidden_size: int) -> dict[int, Tensor]:
        """Return the fitted gates that the halting rule reads, [hidden_size + 4] each, by layer.

        Raises:
            PlanError: no layer after which tokens may halt has one, or one is of another model's shape.
        """
        layers = self._halt_layers(num_layers)
        if self.halting is None or not self.halting.rule.reads_gates or not layers:
            return {}
        tensors, names = self.tensors or {}, {i: f"gate.{i}.weight" for i in layers}
        gates = {i: tensors[name] for i, name in names.items() if name in tensors}
        if not gates:
            raise PlanError(
                f"its rule reads fitted gates, and none of {names[layers[0]]} to {names[layers[-1]]} is in the plan"
            )
        for i, gate in gates.items():
            if tuple(gate.shape) != (hidden_size + 4,):
                raise PlanError(
                    f"tensor {names[i]} has shape {tuple(gate.shape)}, the model needs ({hidden_size + 4},)"
                )
        return gates

    def _halt_layers(self, num_layers: int) -> range:
        """Return the layers after which tokens may halt."""
        return range(0) if self.halting is None else range(self.halting.first_halt(num_layers), num_layers - 1)

    @staticmethod
    def _check_precision(precision: PrecisionConfig, num_layers: int, num_maps: int) -> None:
        if not precision.rule.is_fitted:
            raise PlanError(
                "its thresholds are still to be fitted to the model: the shell command `quicksilver plan fit MODEL PLAN"
                " -o FILE.json` writes a plan file that has them, to be given instead"
            )
        if num_maps == 0:
            raise PlanError(
                "it chooses widths of nested weights, the model's are plain: quicksilver.load(FOLDER, plan=...) nests"
                " them in memory, the shell command `quicksilver quantize FOLDER -o NESTED` once and for all"
            )
        precision.rule.check_maps(num_layers, num_maps)

    def _body(self) -> dict[str, Any]:
        halting = None if self.halting is None else codec.encode_fields(self.halting)
        body = {"halting": halting, "kv": codec.encode(self.kv)}
        # plans without one keep the hash they always had
        for part in ("fusion", "precision", "maps", "shortcuts", "attention", "screening", "entries"):
            if (config := getattr(self, part)) is not None:
                body[part] = codec.encode_fields(config)
        if self.tensors is not None:
            body["tensors"] = {"digest": self.tensors.digest}
        return body


def _load_tensors(data: object, path: Path) -> PlanTensors | None:
    """Return the tensors that a plan's file refers to, None where it refers to none."""
    declared = data.get("tensors") if isinstance(data, dict) else None
    if declared is None:
        return None
    file = declared.get("file") if isinstance(declared, dict) else None
    if not isinstance(file, str) or file in ("", "..") or "\0" in file or Path(file).name != file:
        raise PlanError(f"{path}: tensors.file must be the name of a file beside the plan, got {file!r}")
    return PlanTensors.load(path.parent / file)


def _check_tensors(declared: object, tensors: PlanTensors | None, source: str) -> None:
    digest = declared.get("digest") if isinstance(declared, dict) else None
    if declared is not None and not isinstance(digest, str):
        raise PlanError(f"{source}: tensors.digest is missing")
    found = None if tensors is None else tensors.digest
    if digest != found:
        raise PlanError(f"{source}: the plan's tensors have digest {found}, it was made with {digest}")


def _paper(name: str, kv: KVFill) -> Plan:
    """The published rule, literally: drift below 0.045 and entropy below 1.15 bits, nothing else protected."""
    rule = AllRule((DriftRule(0.045), EntropyRule(1.15)))
    return Plan(name, HaltingConfig(rule, min_layer=1, protect_first=0, protect_special=True), kv)


def _uniform(width: int) -> Plan:
    """The baseline of every width policy: `width` bits throughout, for every token."""
    rule = UniformWidthRule(width)
    return Plan(f"uniform-{width}bit", precision=PrecisionConfig(rule, protect_first=0, protect_special=False))


PRESETS: dict[str, Plan] = {
    "dense": Plan.dense(),
    "paper": _paper("paper", DropFill()),
    "paper-zero": _paper("paper-zero", ZeroFill()),
    "relative": Plan("relative", HaltingConfig(RelativeDriftRule(0.15), min_layer=0.66), PropagateFill()),
    "settled": Plan(
        "settled",
        HaltingConfig(AllRule((RelativeDriftRule(0.15), EntropyRule(1.0))), min_layer=0.66),
        PropagateFill(),
    ),
    "fused-prompt": Plan("fused-prompt", fusion=FusionConfig(CosineFusionRule(0.75))),
    "uniform-8bit": _uniform(8),
    "uniform-4bit": _uniform(4),
    "channel-5bit": Plan("channel-5bit", precision=PrecisionConfig(ChannelWidthRule(target=5.0))),
}
