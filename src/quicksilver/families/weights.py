"""Whether a model's weights are in memory and what the runtime takes them for: PyTorch's own tensors of floats."""

from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.errors import UnsupportedModelError
from quicksilver.weights.config import is_quantized

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weights(model: Any) -> None:
    """Raise UnsupportedModelError naming the first weight that is elsewhere, or is no tensor of floats."""
    family = model.config.model_type
    if getattr(model.config, "quantization_config", None) is not None and not is_quantized(model.config):
        raise UnsupportedModelError(f"{family}: weights quantized by another package are not supported")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{family}: weight {name!r} is on the meta device (never loaded, or offloaded to CPU or disk by"
                " accelerate); load the whole model onto one device, without a device map"
            )
        kind = type(tensor).__name__ if type(tensor) not in (nn.Parameter, Tensor) else None
        if kind is None and tensor.layout != torch.strided:
            kind = f"tensor of layout {str(tensor.layout).removeprefix('torch.')}"
        if kind is None and isinstance(tensor, nn.Parameter) and tensor.dtype not in FLOATS:
            kind = f"tensor of {str(tensor.dtype).removeprefix('torch.')}"
        if kind is not None:
            raise UnsupportedModelError(
                f"{family}: weight {name!r} is a {kind}, quantized, distributed or laid out by another package; load"
                " the model whole, in float32 or bfloat16"
            )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise UnsupportedModelError(f"{family}: a model spread over {names} is not supported")


class WeightPlaces:
    """Where a model's parameters are held, checked already; checks them again where others are in their place."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._held = [module._parameters for module in model.modules() if module._parameters]
        self._known = self._found()

    def check(self) -> None:
        """Raise UnsupportedModelError where a parameter was replaced by one that `check_weights` refuses."""
        found = self._found()
        if len(found) != len(self._known) or any(map(is_not, found, self._known)):
            check_weights(self._model)
            self._known = found

    @property
    def form(self) -> list[object]:
        """Dtype and device of the first and the last parameter: a model is moved or converted as a whole."""
        first, last = self._known[0], self._known[-1]
        return [(weight.dtype, weight.device) for weight in (first, last) if weight is not None]

    def _found(self) -> list[Tensor | None]:
        return [*chain.from_iterable(map(dict.values, self._held))]
