"""Modules with any-precision weights: linear maps read at any number of bits, and embeddings read at eight.

Which bits are read is the caller's to say. PyTorch's path is the definition: weights are expanded to floats before
they are multiplied. Where the caller asks for compiled kernels, rows go through `ops/any_precision_linear.py` instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quicksilver.core.bits import MAX_BITS
from quicksilver.ops.any_precision_linear import StoredMatrix, accepts, check_rows, multiply, prepared
from quicksilver.ops.native import Kernels
from quicksilver.quant.codes import TABLE_BITS, AnyPrecisionCodes, QuantGrid, centres
from quicksilver.quant.planes import PLANE_BITS, run_bytes

_NUM_PLANES = len(PLANE_BITS)
_LEVELS = [2**bits for bits in TABLE_BITS]
BY_CHANNEL = (*(f"plane_{i}" for i in range(_NUM_PLANES)), "exponents", "zeros")
"""Buffers of a `AnyPrecisionWeight` that hold something of each input channel, [in, ...] uint8."""


class AnyPrecisionWeight(nn.Module):
    """A matrix [in, out] in any-precision codes, kept as integer buffers so that no change of dtype touches them.

    `channel_bytes` are those read of one input channel at 0, 1, ... 8 bits: its planes, and its scales unless skipped.
    """

    def __init__(self, codes: AnyPrecisionCodes) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs = codes.planes[0].shape[0], codes.num_outputs
        self.group_size = codes.grid.group_size
        for i, plane in enumerate(codes.planes):
            self.register_buffer(f"plane_{i}", plane)
        self.register_buffer("exponents", codes.grid.exponents)
        self.register_buffer("zeros", codes.grid.zeros)
        tables = [codes.tables.get(bits, centres(bits)).to(codes.planes[0].device) for bits in TABLE_BITS]
        self.register_buffer("constants", torch.cat((codes.grid.largest[None], *tables)).view(torch.int32))  # as bits
        scale_bytes = 2 * codes.grid.zeros.shape[1]
        self.channel_bytes = tuple(
            run_bytes(self.num_outputs, bits) + (scale_bytes if bits else 0) for bits in range(MAX_BITS + 1)
        )
        self._norms: Tensor | None = None

    @property
    def codes(self) -> AnyPrecisionCodes:
        """The matrix."""
        largest, *levels = self.get_buffer("constants").view(torch.float32).split([1, *_LEVELS])
        grid = QuantGrid(self.get_buffer("exponents"), self.get_buffer("zeros"), largest[0], self.group_size)
        planes = tuple(self.get_buffer(f"plane_{i}") for i in range(_NUM_PLANES))
        return AnyPrecisionCodes(planes, grid, self.num_outputs, dict(zip(TABLE_BITS, levels, strict=True)))

    @property
    def stored(self) -> StoredMatrix:
        """The matrix as the kernels' operator takes it."""
        *planes, exponents, zeros = (self._buffers[name] for name in BY_CHANNEL)
        return StoredMatrix(planes, exponents, zeros, self._buffers["constants"], self.group_size, self.num_outputs)  # type: ignore[arg-type]

    @property
    def channel_norms(self) -> Tensor:
        """[in] float32, the Euclidean norm of each input channel's weights."""
        if self._norms is None:
            self._norms = self.codes.dequantize().norm(dim=1)
        return self._norms

    @property
    def code_bytes(self) -> int:
        """Bytes of codes, scales and levels."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def pack_channels(self) -> Tensor:
        """Return what is kept of each input channel, [in, bytes] uint8: its planes, exponents and zeros, end to end."""
        return torch.cat([self.get_buffer(name) for name in BY_CHANNEL], dim=1)

    def unpack_channels(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the buffers that `pack_channels` joined, by name."""
        sizes = [self.get_buffer(name).shape[1] for name in BY_CHANNEL]
        return {name: part.contiguous() for name, part in zip(BY_CHANNEL, packed.split(sizes, dim=1), strict=True)}

    def forget_norms(self) -> None:
        """Let channels' norms be taken anew when they are next asked for; they are those of other codes."""
        self._norms = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_norms()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget_norms()  # they stay behind where the buffers move
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return what `print` shows of the module."""
        return f"in={self.num_inputs}, out={self.num_outputs}, group_size={self.group_size}"


class AnyPrecisionLinear(AnyPrecisionWeight):
    """`y = x W + b`, where W [in, out] is read at bits chosen for everything, or per row and input channel."""

    def __init__(self, codes: AnyPrecisionCodes, bias: Tensor | None) -> None:
        super().__init__(codes)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._expanded: dict[tuple[int, torch.dtype], Tensor] | None = None

    @property
    def is_expanded(self) -> bool:
        """Whether the floats that weights are expanded to are kept for now (see `keeping_expanded`)."""
        return self._expanded is not None

    def forward(
        self,
        x: Tensor,
        bits: int | Tensor = MAX_BITS,
        present: Sequence[int] = range(1, MAX_BITS + 1),
        kernels: Kernels = "torch",
    ) -> Tensor:
        """Apply the map to rows.

        Args:
            x: [..., in].
            bits: bits to read: one number, [N] uint8 for the N rows of x, or [N, in] uint8 for their channels; 0
                leaves a channel out.
            present: bits above 0 that may be among them.
            kernels: "native" reads the codes themselves where that is possible: in float32 on the CPU, without
                gradients and outside of `keeping_expanded`.

        Returns:
            [..., out] in x's dtype.

        Raises:
            KernelsUnavailableError: "native" is asked for, and there are no kernels.
        """
        rows = x.reshape(-1, self.num_inputs)
        by_channel = isinstance(bits, Tensor) and bits.dim() == 2
        read = kernels == "native" and self._expanded is None and accepts(rows)
        matrix = prepared(self.stored, by_channel) if read else None
        y = self._by_bits(rows, bits, present) if matrix is None else self._by_kernels(rows, matrix, bits)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.num_outputs)

    def _by_kernels(self, rows: Tensor, matrix: Any, bits: int | Tensor) -> Tensor:
        """Return [N, out], by the kernels, past PyTorch's dispatcher."""
        each, uniform = (None, bits) if isinstance(bits, int) else (bits, MAX_BITS)
        check_rows(rows, self.stored, each, uniform)
        return multiply(rows, matrix, each, uniform)

    def _by_bits(self, rows: Tensor, bits: int | Tensor, present: Sequence[int]) -> Tensor:
        """Return [N, out], by products with weights expanded to floats."""
        if isinstance(bits, int):
            return rows @ self._weight(bits, rows.dtype) if bits else rows.new_zeros((len(rows), self.num_outputs))
        by_part = self._by_row if bits.dim() == 1 else self._by_channel
        return by_part(rows, bits, present)

    def _weight(self, bits: int, dtype: torch.dtype, channels: Tensor | None = None) -> Tensor:
        """Return the weights of all channels, or of the given ones, [M, out]."""
        if self._expanded is not None:
            if (bits, dtype) not in self._expanded:
                self._expanded[bits, dtype] = self.codes.dequantize(bits).to(dtype)
            whole = self._expanded[bits, dtype]
            return whole if channels is None or len(channels) == len(whole) else whole.index_select(0, channels)
        codes = self.codes if channels is None else self.codes.select(channels, bits)
        return codes.dequantize(bits).to(dtype)

    def _by_row(self, x: Tensor, bits: Tensor, present: Sequence[int]) -> Tensor:
        """Return [N, out]: for each number of bits one product, over the rows that read it."""
        y = x.new_zeros((x.shape[0], self.num_outputs))
        for value in present:
            rows = (bits == value).nonzero().squeeze(-1)
            if len(rows):
                y.index_copy_(0, rows, x.index_select(0, rows) @ self._weight(value, x.dtype))
        return y

    def _by_channel(self, x: Tensor, bits: Tensor, present: Sequence[int]) -> Tensor:
        """Return [N, out]: for each number of bits one product, over the channels that any row reads at it.

        Parts are products in float32 at least: float16 may not hold parts of a sum that it holds.
        """
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        y = x.new_zeros((x.shape[0], self.num_outputs))
        for value in present:
            chosen = bits == value
            channels = chosen.any(0).nonzero().squeeze(-1)
            if len(channels):
                part = torch.where(chosen, x, 0.0)
                part = part if len(channels) == self.num_inputs else part.index_select(1, channels)
                y += part @ self._weight(value, x.dtype, channels)
        return y.to(dtype)


@contextmanager
def keeping_expanded(model: nn.Module) -> Iterator[None]:
    """Keep the floats that weights are expanded to, a model's memory for each number of bits read: the same, sooner."""
    modules = [module for module in model.modules() if isinstance(module, AnyPrecisionLinear)]
    try:
        for module in modules:
            module._expanded = {}
        yield
    finally:
        for module in modules:
            module._expanded = None


class AnyPrecisionSplit(nn.Module):
    """Several linear maps of one input, their outputs end to end, as in a fused projection."""

    def __init__(self, parts: Sequence[AnyPrecisionLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all parts at eight bits: [..., in] to [..., sum of outs]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class AnyPrecisionEmbedding(AnyPrecisionWeight):
    """A table of embeddings [vocab, d] in any-precision codes, read at eight bits and given out in a dtype.

    They are multiplied by a scale, rounded to that dtype first; transformers looks for it by the attribute's name.
    """

    def __init__(self, codes: AnyPrecisionCodes, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__(codes)
        if scale is not None:
            self.scalar_embed_scale = scale
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)  # follows `.to(dtype)`

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens: [...] to [..., d]."""
        rows = self.codes.select(token_ids.reshape(-1)).dequantize()
        embeddings = rows.to(self.get_buffer("_like").dtype).view(*token_ids.shape, self.num_outputs)
        scale = getattr(self, "scalar_embed_scale", None)
        return embeddings if scale is None else embeddings * torch.tensor(scale, dtype=embeddings.dtype)
