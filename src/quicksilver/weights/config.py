"""What a model's any-precision weights were made with: the `quantization_config` of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from quicksilver.errors import ModelError
from quicksilver.weights.codes import check_group_size

QUANT_METHOD = "quicksilver"
VERSION = 2
Method = Literal["nearest", "compensated", "taken over"]
METHODS: tuple[Method, ...] = get_args(Method)
TAKEN_OVER: Method = "taken over"


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights are quantized.

    Raises:
        ModelError: a value that is none of these.
    """

    group_size: int | None = 32  # inputs that share a scale; None where weights are taken over: each map has its own
    # every weight rounded on its own; or so that errors make up for one another on calibration text; or the codes of
    # another program's files as they are
    method: Method = "nearest"
    head: bool = True  # the head is quantized
    embeddings: bool = True  # the token embedding is; where the head shares its table, they share one of codes

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ModelError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method != TAKEN_OVER or self.group_size is not None:
            check_group_size(self.group_size)
        for name in ("head", "embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds under "quantization_config"."""
        return {"quant_method": QUANT_METHOD, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: object) -> QuantizationConfig:
        """Read what `to_dict` made; `source` is the file that it comes from. ModelError for anything else."""
        where, names = f"{source}: quantization_config", [field.name for field in fields(cls)]
        for key, known in {"quant_method": QUANT_METHOD, "version": VERSION}.items():
            if isinstance(data.get(key), bool) or data.get(key) != known:
                again = "; an earlier version wrote it: quantize the model again" if data.get(key) == 1 else ""
                raise ModelError(f"{where}: {key} is {data.get(key)!r}; this version reads {known!r}{again}")
        odd = sorted(set(data) ^ {"quant_method", "version", *names})
        if odd:
            raise ModelError(f"{where}: {'unknown' if odd[0] in data else 'missing'} key {odd[0]!r}")
        try:
            return cls(**{name: data[name] for name in names})
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None


LAYERS_ONLY = QuantizationConfig(head=False, embeddings=False)
"""The maps of the layers, whose bits a plan chooses, are rounded; all else stays as it is."""


def is_quantized(config: Any) -> bool:
    """Whether a transformers configuration says that its model's weights are quantized."""
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, Mapping) and stored.get("quant_method") == QUANT_METHOD
