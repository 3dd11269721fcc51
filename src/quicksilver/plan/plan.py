"""The plan: what each mechanism may do, as one immutable, hashable, versioned value.

Reading and writing files is here; deciding anything about tokens is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quicksilver.core.checks import is_whole
from quicksilver.core.files import write_atomically
from quicksilver.errors import PlanError
from quicksilver.plan import codec
from quicksilver.plan.tensors import Array, PlanTensors, named_vector
from quicksilver.plan.version1 import upgraded
from quicksilver.rules import (
    AllRule,
    ChannelBitsRule,
    CosineFusionRule,
    DriftRule,
    EntropyRule,
    FusionConfig,
    HaltingConfig,
    KVConfig,
    PrecisionConfig,
    PropagateFill,
    RelativeDriftRule,
    Shortcut,
    UniformBitsRule,
    ZeroFill,
)
from quicksilver.rules.checks import check_parts
from quicksilver.rules.registry import guarded

if TYPE_CHECKING:
    from torch import Tensor

    from quicksilver.plan.affine import AffineMap

PLAN_VERSION = 2
PARTS: dict[str, type] = {
    "halting": HaltingConfig,
    "kv": KVConfig,
    "fusion": FusionConfig,
    "precision": PrecisionConfig,
}
"""The four mechanisms, and what configures each."""


@dataclass(frozen=True)
class FittedTo:
    """The model and the text that thresholds were fitted to; PlanError where a value is of another type."""

    model: str  # its name, for people
    fingerprint: str  # tells it from others
    calibration: str  # the text's name, or how it was made
    tokens: int  # of that text, how many were used

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "calibration"):
            if not isinstance(getattr(self, name), str):
                raise PlanError(f"{name} must be a string, got {getattr(self, name)!r}")
        if not is_whole(self.tokens) or self.tokens < 1:
            raise PlanError(f"tokens must be a whole number above 0, got {self.tokens!r}")

    def mismatch(self, fingerprint: str) -> str | None:
        """Return what to say where a plan with this record is run on the model of a fingerprint; None if it fits."""
        if fingerprint == self.fingerprint:
            return None
        return (
            f"its thresholds were fitted to another model ({self.model}, {self.fingerprint}) than this one"
            f" ({fingerprint}); they are absolute and mean something else here: fit it anew with the shell command"
            " `quicksilver plan fit`"
        )


class Fitted(NamedTuple):
    """Which of a plan's tensors a model runs by."""

    maps: dict[str, AffineMap]  # by name: `output.LAYER`, and each shortcut's
    shortcut_gates: dict[Shortcut, Tensor]  # [hidden_size + 2] each, of the shortcuts that ask one
    gates: dict[int, Tensor]  # [hidden_size + 4] each, by layer, where the halting rule reads them


@dataclass(frozen=True)
class Plan:
    """What a run may save and how. `Plan.dense()` changes nothing."""

    name: str = "plan"  # a label for tables; not part of the hash
    halting: HaltingConfig | None = None  # which tokens stop early or skip sublayers, or None for none
    # what halted tokens leave in the cache, its bits, and what of it is not read
    kv: KVConfig = field(default_factory=KVConfig)
    fusion: FusionConfig | None = None  # which adjacent tokens become one, or None for none
    precision: PrecisionConfig | None = None  # how many bits of any-precision weights are read, or None for all
    tensors: PlanTensors | None = None  # maps, gates and means that were fitted, or None for nothing
    # the model that thresholds and tensors were fitted to, or None where that is not known; not part of the hash, which
    # is of what the plan does
    fitted_to: FittedTo | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PlanError(f"a plan's name must be a string, got {repr(self.name)[:40]}; it is the first argument")
        if not self.name.isprintable():
            raise PlanError(f"a plan's name must be printable, got {self.name[:40]!a}")
        check_parts(self, f"plan {self.name!r}", ": ")

    @classmethod
    def dense(cls) -> Plan:
        """Return the plan with every mechanism off; equal to the model as published."""
        return cls(name="dense")

    @classmethod
    def preset(cls, name: str) -> Plan:
        """Return a preset by name; PlanError where none has it."""
        if name not in PRESETS:
            raise PlanError(f"no preset plan is called {name!r}; presets: {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, data: object, source: str = "plan", tensors: PlanTensors | None = None) -> Plan:
        """Build a plan from decoded JSON.

        Args:
            data: the JSON object.
            source: names it in errors.
            tensors: `Plan.stored` of the plan that it was made of, where it refers to that.

        Raises:
            PlanError: unknown version, key, type or value; other tensors than the plan's.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{source}: a plan is a JSON object, got {type(data).__name__}")
        data = dict(data)
        if "version" not in data:
            raise PlanError(f'{source}: version is missing: a plan says "version": {PLAN_VERSION}')
        version = data.pop("version")
        if version == 1:
            data = upgraded(data, source)
        elif version != PLAN_VERSION:
            raise PlanError(f"{source}: plan version {version!r} is not supported (this is {PLAN_VERSION})")
        read: set[str] = set()

        def array(name: object, where: str) -> Array:
            if tensors is None or not isinstance(name, str) or name not in tensors:
                raise PlanError(f"{where}: the plan's tensors hold no array {name!r}")
            read.add(name)
            return tensors.array(name)

        given = {key: data.pop(key, None) for key in (*PARTS, "fitted_to")}
        declared, declared_hash, name = data.pop("tensors", None), data.pop("hash", None), data.pop("name", "plan")
        if data:
            raise PlanError(f"{source}: unknown key {next(iter(data))!r}")
        if not isinstance(name, str) or not name.isprintable():
            raise PlanError(f"{source}: name must be a printable string, got {name!a}")
        found = {
            key: codec.decode(PARTS.get(key, FittedTo), part, f"{source}: {key}", array)
            for key, part in given.items()
            if part is not None
        }
        stored = None if tensors is None else tensors.narrowed(read)
        _check_tensors(declared, stored, source)
        plan = cls(name, **found, tensors=None if stored is None else stored.without(read) or None)
        if declared_hash is not None and declared_hash != plan.hash:
            raise PlanError(
                f"{source}: hash {declared_hash!r} does not match the contents ({plan.hash}); if they were changed on"
                ' purpose, take "hash" out of the file'
            )
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a JSON file, and its tensors from the file beside it that it names.

        PlanError says that a file is missing, unreadable, or not a valid plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # a byte order mark is let be
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a JSON plan: {error}") from None
        return cls.from_dict(data, str(path), _load_tensors(data, Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, with its version and hash; long lists are in `stored`."""
        record = {} if self.fitted_to is None else {"fitted_to": asdict(self.fitted_to)}
        return {"version": PLAN_VERSION, "name": self.name, **self._written[0], **record, "hash": self.hash}

    def to_json(self) -> str:
        """Return the plan as JSON to be read, a line for each thing that it says."""
        return codec.text(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, what is stored beside it first; no interruption leaves a file half-written."""
        path, data = Path(path), self.to_dict()
        if self.stored is not None:
            beside = path.with_suffix(".safetensors")
            data["tensors"] = {"file": beside.name, **data["tensors"]}
            self.stored.save(beside)
        write_atomically(path, codec.text(data) + "\n")

    @cached_property
    def _written(self) -> tuple[dict[str, Any], PlanTensors | None]:
        """What the plan does, JSON-ready, and its tensors with the lists that are too long for JSON."""
        arrays: dict[str, Array] = {}
        parts = {key: getattr(self, key) for key in PARTS}
        body = {key: codec.encode(p, key, arrays) for key, p in parts.items() if p not in (None, KVConfig())}
        if self.tensors is None and not arrays:
            return body, None
        stored = (self.tensors or PlanTensors({})).with_arrays(arrays)
        return {**body, "tensors": {"digest": stored.digest}}, stored

    @property
    def stored(self) -> PlanTensors | None:
        """The plan's tensors, and as arrays its lists of more than eight numbers; None where there is neither."""
        return self._written[1]

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over what the plan does; neither its name nor `fitted_to` counts."""
        text = json.dumps({"version": PLAN_VERSION, **self._written[0]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_dense(self) -> bool:
        """Whether every mechanism is off."""
        stops = self.halting is not None and (self.halting.rule is not None or self.halting.shortcuts)
        return not stops and self.kv.is_dense and self.fusion is None and self.precision is None

    @property
    def is_recipe(self) -> bool:
        """Whether thresholds are still to be fitted to a model before the plan can run."""
        return self.precision is not None and not self.precision.rule.is_fitted

    def renamed(self, name: str) -> Plan:
        """Return the same plan under another label."""
        return replace(self, name=name)

    def check_model(self, num_layers: int, num_maps: int, hidden_size: int) -> Fitted:
        """Return the tensors that a model runs by; raise PlanError where the plan does not fit it.

        `num_maps` are the quantized linear maps of each of its layers, 0 where its weights are plain.
        """
        try:
            if self.halting is not None:
                self.halting.check_depth(num_layers)
            self.kv.check_depth(num_layers)
            if self.fusion is not None:
                self.fusion.after_layers(num_layers)
            if self.precision is not None:
                self._check_precision(self.precision, num_layers, num_maps)
            asking = {each: f"{each.name}.gate" for each in self.shortcuts if each.threshold is not None}
            return Fitted(
                self._maps(num_layers, hidden_size),
                {each: named_vector(self.tensors or {}, name, hidden_size + 2) for each, name in asking.items()},
                self._gates(num_layers, hidden_size),
            )
        except PlanError as error:
            whose = "" if self.fitted_to is None else f"; the plan was fitted to {self.fitted_to.model}"
            raise PlanError(f"plan {self.name!r}: {error}{whose}") from None

    def _maps(self, num_layers: int, hidden_size: int) -> dict[str, AffineMap]:
        """Every layer after which a token may halt has an output map; one after which tokens only fuse may have one."""
        from quicksilver.plan.affine import AffineMap

        tensors, names = self.tensors or {}, [shortcut.name for shortcut in self.shortcuts]
        if self.halting is not None and self.halting.output_maps:
            names += [f"output.{i}" for i in self._halt_layers(num_layers)]
            fusing = () if self.fusion is None else self.fusion.after_layers(num_layers)
            names += [f"output.{i}" for i in fusing if any(key.startswith(f"output.{i}.") for key in tensors)]
        return {name: AffineMap.named(tensors, name, hidden_size) for name in names}

    @property
    def shortcuts(self) -> tuple[Shortcut, ...]:
        """Fitted maps that stand in for sublayers."""
        return () if self.halting is None else self.halting.shortcuts

    def _gates(self, num_layers: int, hidden_size: int) -> dict[int, Tensor]:
        layers = self._halt_layers(num_layers)
        if not layers or not self.halting.rule.reads_gates:  # type: ignore[union-attr]
            return {}
        tensors, names = self.tensors or {}, {i: f"gate.{i}.weight" for i in layers}
        found = {i: name for i, name in names.items() if name in tensors}
        if not found:
            raise PlanError(
                f"its rule reads fitted gates, and none of {names[layers[0]]} to {names[layers[-1]]} is in the plan"
            )
        return {i: named_vector(tensors, name, hidden_size + 4) for i, name in found.items()}

    def _halt_layers(self, num_layers: int) -> range:
        """Return the layers after which tokens may halt."""
        if self.halting is None or self.halting.rule is None:
            return range(0)
        return range(self.halting.first_halt(num_layers), num_layers - 1)

    @staticmethod
    def _check_precision(precision: PrecisionConfig, num_layers: int, num_maps: int) -> None:
        if not precision.rule.is_fitted:
            raise PlanError(
                "its thresholds are still to be fitted to the model: the shell command `quicksilver plan fit MODEL PLAN"
                " -o FILE.json` writes a plan file that has them, to be given instead"
            )
        if num_maps == 0:
            raise PlanError(
                "it chooses bits of weights that are not quantized: quicksilver.load(FOLDER, plan=...) quantizes"
                " them in memory, the shell command `quicksilver quantize FOLDER -o QUANTIZED` once and for all"
            )
        guarded(precision.rule.check_maps, num_layers, num_maps)


def _load_tensors(data: object, path: Path) -> PlanTensors | None:
    """Return the tensors that a plan's file refers to, None where it refers to none."""
    declared = data.get("tensors") if isinstance(data, dict) else None
    if declared is None:
        return None
    file = declared.get("file") if isinstance(declared, dict) else None
    if isinstance(declared, dict) and "file" in declared and file is None:
        raise PlanError(
            f"{path}: it was printed without the numbers that it names (tensors.file is null); copy the plan's own file"
            " and the safetensors file beside it, or call plan.save"
        )
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


def _paper(name: str, kv: KVConfig) -> Plan:
    """The published rule, literally: drift below 0.045 and entropy below 1.15 bits, nothing else protected."""
    rule = AllRule((DriftRule(0.045), EntropyRule(1.15)))
    return Plan(name, HaltingConfig(rule, min_layer=1, protect_first=0, protect_special=True), kv)


def _uniform(bits: int) -> Plan:
    """The baseline of every precision rule: `bits` bits throughout, for every token."""
    rule = UniformBitsRule(bits)
    return Plan(f"uniform-{bits}bit", precision=PrecisionConfig(rule, protect_first=0, protect_special=False))


_SETTLED = AllRule((RelativeDriftRule(0.15), EntropyRule(1.0)))
_PROPAGATE = KVConfig(PropagateFill())
PRESETS: dict[str, Plan] = {
    "dense": Plan.dense(),
    "paper": _paper("paper", KVConfig()),
    "paper-zero": _paper("paper-zero", KVConfig(ZeroFill())),
    "relative": Plan("relative", HaltingConfig(RelativeDriftRule(0.15), min_layer=0.66), _PROPAGATE),
    "settled": Plan("settled", HaltingConfig(_SETTLED, min_layer=0.66), _PROPAGATE),
    "fused-prompt": Plan("fused-prompt", fusion=FusionConfig(CosineFusionRule(0.75))),
    "uniform-8bit": _uniform(8),
    "uniform-4bit": _uniform(4),
    "channel-5bit": Plan("channel-5bit", precision=PrecisionConfig(ChannelBitsRule(target=5.0))),
}
