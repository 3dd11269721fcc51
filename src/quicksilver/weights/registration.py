"""The method of any-precision weights, made known to transformers, so that what cannot load them says what can."""

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quicksilver.errors import UnsupportedFeatureError
from quicksilver.weights.config import QUANT_METHOD


class AnyPrecisionMethodConfig(QuantizationConfigMixin):
    """A model's `quantization_config` as transformers hands it around; `QuantizationConfig` is what it means."""

    def __init__(self, **stored: Any) -> None:
        self.__dict__.update(stored)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]


class AnyPrecisionQuantizer(HfQuantizer):
    """Refuses to load what transformers would fill with random weights."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnsupportedFeatureError; transformers asks before it reads weights."""
        raise UnsupportedFeatureError(
            "transformers' from_pretrained cannot load weights that quicksilver has quantized, and quantizes none; load"
            " the folder with quicksilver.load, which gives transformers' model as .model"
        )

    def is_serializable(self) -> None:
        """Say no, by None: transformers has no such model to save."""

    @property
    def is_trainable(self) -> None:
        """None, which is no: transformers has no such model to train."""


def register_method() -> None:
    """Make the method known to transformers, where it is not yet."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(AnyPrecisionMethodConfig)
        register_quantizer(QUANT_METHOD)(AnyPrecisionQuantizer)
