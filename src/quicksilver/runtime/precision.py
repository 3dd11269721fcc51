"""Precision inside a layer: ask the policy how many bits of each map are read, read them, count them.

The rules themselves are in `quicksilver.rules.precision`; reading is `quicksilver.quant`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quicksilver.core.bits import MAX_WIDTH, WEIGHT_BITS
from quicksilver.core.decisions import ChannelView, TokenBitsView
from quicksilver.core.trace import LayerTrace, Trace
from quicksilver.errors import PlanError
from quicksilver.families.spec import Adapter, Apply
from quicksilver.plan import Plan
from quicksilver.plan.tensors import named_vector
from quicksilver.quant import NestedLinear
from quicksilver.rules.precision.base import mean_name
from quicksilver.runtime.protection import Protection


def apply_plain(module: Any, x: Tensor) -> Tensor:
    """Apply a linear map as it is."""
    return module(x)


class Centre:
    """The mean of one map's inputs, [in], and what the map gives for it, all bits read and without bias, [out].

    Args:
        module: the map.
        mean: as the plan holds it.
    """

    def __init__(self, module: NestedLinear, mean: Tensor) -> None:
        self._module, self._mean = module, mean
        self._bound: tuple[Tensor, Tensor] | None = None

    def bind(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the device and in the dtype of the map's inputs."""
        if self._bound is None:
            mean = self._mean.to(like.device, like.dtype)
            product = self._module(mean[None])[0]
            self._bound = mean, product if self._module.bias is None else product - self._module.bias
        return self._bound


class PrecisionStep:
    """A plan's precision bound to a model.

    Args:
        adapter: the model.
        plan: says how many bits are read.
        special_ids: token ids that are protected where the configuration says so.
        head_entropy: maps states [M, d] to the entropy of the model's head on them, [M], in bits.

    Raises:
        PlanError: the mean of a map's inputs is missing, or of another shape.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        special_ids: Sequence[int],
        head_entropy: Callable[[Tensor], Tensor],
    ) -> None:
        spec, config = adapter.spec, plan.precision
        self._is_nested = spec.is_nested
        self._kernels = adapter.kernels
        self._rule = None if config is None else config.rule
        self._protection = Protection(config, special_ids, spec.device)
        self._head_entropy = head_entropy
        self._token_layer = None if self._rule is None else self._rule.after_layer(spec.num_layers)
        self._num_maps = len(adapter.layers[0].nested)
        self._map_idx = {id(module): i for layer in adapter.layers for i, module in enumerate(layer.nested)}
        centred = self._rule is not None and self._rule.reads_means
        self._centres = _centres(adapter, plan.tensors or {}) if centred else {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers after which tokens decide how many bits they read."""
        return () if self._token_layer is None else (self._token_layer,)

    def centre(self, module: NestedLinear) -> Centre | None:
        """Return the mean of a map's inputs, None where they are taken as they are."""
        return self._centres.get(id(module))

    def exempt(self, token_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Return which tokens of a pass read all bits, [N] bool; None where none does by protection."""
        return self._protection.found(token_ids, positions)

    def linear(
        self,
        layer_idx: int,
        origins: Tensor,
        caps: Tensor | None,
        exempt: Tensor | None,
        trace: LayerTrace,
    ) -> Apply:
        """Return the function that applies this layer's maps to rows.

        Args:
            layer_idx: the layer.
            origins: [M] which of the pass's tokens the rows are.
            caps: [N] uint8, the most bits that each token of the pass may read; None for no limit.
            exempt: [N] tokens that read all bits.
            trace: of the layer.
        """
        if not self._is_nested:
            return apply_plain
        if self._rule is None:
            return partial(self._apply, trace, lambda module, x: MAX_WIDTH)
        caps, exempt = (None if t is None else t.index_select(0, origins) for t in (caps, exempt))
        return partial(self._apply, trace, partial(self._choose, layer_idx, caps, exempt, trace))

    def decide_tokens(
        self, layer_idx: int, hidden: Tensor, origins: Tensor, caps: Tensor | None, count: int, trace: Trace
    ) -> Tensor | None:
        """Return the pass's caps after a layer, [count] uint8: of tokens `origins`, as their states [M, d] decide."""
        if self._rule is None or layer_idx != self._token_layer or len(hidden) == 0:
            return caps
        choice = self._rule.ask_tokens(TokenBitsView(hidden, self._head_entropy))
        trace.at(layer_idx).signal_rows.update(choice.signal_rows)
        trace.at(layer_idx).rule_macs += choice.macs
        if caps is None:
            caps = torch.full((count,), MAX_WIDTH, dtype=torch.uint8, device=hidden.device)
        return caps.index_copy(0, origins, choice.bits)  # type: ignore[arg-type]

    def _choose(
        self,
        layer_idx: int,
        caps: Tensor | None,
        exempt: Tensor | None,
        trace: LayerTrace,
        module: NestedLinear,
        x: Tensor,
    ) -> int | Tensor:
        view = ChannelView(layer_idx, self._map_idx[id(module)], self._num_maps, x, lambda: module.channel_norms, caps)
        choice = self._rule.ask(view)  # type: ignore[union-attr]
        trace.signal_rows.update(choice.signal_rows)
        trace.rule_macs += choice.macs
        widths = choice.bits
        if exempt is None or (isinstance(widths, int) and widths == MAX_WIDTH):
            return widths
        if isinstance(widths, int):
            widths = torch.full((x.shape[0],), widths, dtype=torch.uint8, device=x.device)
        return widths.masked_fill(exempt if widths.dim() == 1 else exempt[:, None], MAX_WIDTH)

    def _apply(
        self,
        trace: LayerTrace,
        choose: Callable[[NestedLinear, Tensor], int | Tensor],
        module: NestedLinear,
        x: Tensor,
    ) -> Tensor:
        centre = self._centres.get(id(module))
        if centre is None:
            return self._read(trace, choose(module, x), module, x)
        mean, product = centre.bind(x)
        trace.record_fitted(x.shape[0], 0, mean.nbytes + product.nbytes)
        x = x - mean
        return self._read(trace, choose(module, x), module, x) + product

    def _read(self, trace: LayerTrace, widths: int | Tensor, module: NestedLinear, x: Tensor) -> Tensor:
        """Apply a map at chosen widths, and count what is read."""
        counts = _channels_by_width(widths, x)
        trace.widths.add(counts, module.num_outputs, module.channel_bytes)
        if isinstance(counts, list):
            return module(x, widths=widths, kernels=self._kernels)
        present = [width for width, count in enumerate(counts.tolist()) if width and count]
        if not set(present) <= set(WEIGHT_BITS):
            raise PlanError(f"{type(self._rule).__name__}.decide must give 0, 2, 4, 6 or 8 bits, got {present}")
        return module(x, widths=widths, present=present, kernels=self._kernels)


def _centres(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[int, Centre]:
    """Return the means of the inputs of a model's nested maps, by the map's identity."""
    centres = {}
    for layer_idx, layer in enumerate(adapter.layers):
        for map_idx, module in enumerate(layer.nested):
            name = mean_name(layer_idx, map_idx)
            centres[id(module)] = Centre(module, named_vector(tensors, name, module.num_inputs))
    return centres


def _channels_by_width(widths: int | Tensor, x: Tensor) -> list[int] | Tensor:
    """Return how many input channels of x ([M, in]), over all rows, are read at 0, 1, ... 8 bits."""
    if isinstance(widths, int):
        return [x.numel() if width == widths else 0 for width in range(MAX_WIDTH + 1)]
    counts = torch.bincount(widths.flatten().int(), minlength=MAX_WIDTH + 1)
    return counts * x.shape[1] if widths.dim() == 1 else counts
