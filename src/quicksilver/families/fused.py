"""Modules that are several linear maps of one input, their outputs end to end: what is not needed is not multiplied."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quicksilver.families.modules import runs_only
from quicksilver.weights import AnyPrecisionSplit

Parts = tuple[Tensor, ...]


def apply_parts(module: Any, sizes: Sequence[int], first: int, last: int, x: Tensor, apply: Any) -> Parts:
    """Return [N, out] of each of the maps [first, last) of those that a module is, `sizes` the outputs of all.

    With a hook or an adapter on the module it is called whole: what that makes of some, only the whole map knows.
    """
    if isinstance(module, AnyPrecisionSplit):
        return tuple(apply(part, x) for part in tuple(module.parts)[first:last])
    begin, end = sum(sizes[:first]), sum(sizes[:last])
    some = last - first < len(sizes)
    if some and runs_only(module, "transformers.pytorch_utils"):  # Conv1D
        y = torch.addmm(module.bias[begin:end], x, module.weight[:, begin:end])
    elif some and runs_only(module, "torch.nn.modules.linear"):
        y = F.linear(x, module.weight[begin:end], None if module.bias is None else module.bias[begin:end])
    else:
        return apply(module, x).split(list(sizes), -1)[first:last]
    return y.split(list(sizes[first:last]), -1)
