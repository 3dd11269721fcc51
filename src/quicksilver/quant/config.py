"""What a model's any-precision weights were made with: the `quantization_config` of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from quicksilver.errors import ModelError
from quicksilver.quant.codes import check_group_size
from quicksilver.quant.planes import PLANE_BITS

QUANT_METHOD = "quicksilver"
VERSION = 1
Method = Literal["nearest", "compensated"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights are quantized.

    Raises:
        ModelError: a value that is none of these.
    """

    group_size: int = 32  # outputs that share a scale
    # every weight rounded on its own, or so that errors make up for one another on calibration text
    method: Method = "nearest"
    head: bool = False  # the head is quantized too; it no longer shares the embedding's table then
    embeddings: bool = False  # the token embedding is quantized too

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.method not in METHODS:
            raise ModelError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("head", "embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds under "quantization_config"."""
        return {"quant_method": QUANT_METHOD, "version": VERSION, "planes": list(PLANE_BITS), **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: object) -> QuantizationConfig:
        """Read what `to_dict` made; `source` is the file that it comes from. ModelError for anything else."""
        where, names = f"{source}: quantization_config", [field.name for field in fields(cls)]
        fixed = {"quant_method": QUANT_METHOD, "version": VERSION, "planes": list(PLANE_BITS)}
        for key, known in fixed.items():
            if isinstance(data.get(key), bool) or data.get(key) != known:
                raise ModelError(f"{where}: {key} is {data.get(key)!r}; this version reads {known!r}")
        odd = sorted(set(data) ^ {*fixed, *names})
        if odd:
            raise ModelError(f"{where}: {'unknown' if odd[0] in data else 'missing'} key {odd[0]!r}")
        try:
            return cls(**{name: data[name] for name in names})
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None


def is_quantized(config: Any) -> bool:
    """Whether a transformers configuration says that its model's weights are quantized."""
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, Mapping) and stored.get("quant_method") == QUANT_METHOD
