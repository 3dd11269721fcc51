"""Modules with any-precision weights: linear maps read at any number of bits, and embeddings read at all.

Which bits are read is the caller's to say. PyTorch's path is the definition: weights are expanded to floats before
they are multiplied. Where the caller asks for compiled kernels, rows go through `ops/any_precision_linear.py` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from quicksilver.core.bits import MAX_BITS
from quicksilver.ops.any_precision_linear import StoredMatrix, accepts, check_rows, multiply, native_matrix
from quicksilver.ops.native import Kernels
from quicksilver.weights import planes
from quicksilver.weights.codes import GroupedCodes, Scales

BUFFERS = ("high", "low", "steps", "offsets", "zeros", "block_steps", "block_offsets")
"""What a matrix is kept as, where it has it; see `StoredMatrix`."""

FORM = "form"
"""Buffer, [7] int32, of what tensors do not tell: inputs, outputs, bits, group size, the code of zero or -1, by which
power of two scales are multiplied, and the version of the format."""

VERSION = 1
_TILES = 64  # expanded to floats at a time


class AnyPrecisionWeight(nn.Module):
    """A matrix [out, in] in any-precision codes, kept as buffers that no change of dtype touches.

    `channel_bytes` are those read of one input channel at 0, 1, ... 8 bits: its planes, and its share of the scales
    unless it is skipped.
    """

    high: Tensor
    steps: Tensor

    def __init__(self, codes: GroupedCodes, unit: int | None = None) -> None:
        super().__init__()
        if unit is None:
            unit = planes.unit_of(codes.num_outputs, codes.bits)
        high, low = planes.pack(codes.codes, codes.bits, unit)
        scales, extra = codes.scales, -codes.num_outputs % planes.TILE
        zeros = scales.zero if isinstance(scales.zero, Tensor) else None
        by_output = (scales.steps, scales.offsets, zeros, scales.block_steps, scales.block_offsets)
        rows = (None if t is None else nn.functional.pad(t.T, (0, extra)).contiguous() for t in by_output)
        zero = scales.zero if isinstance(scales.zero, int) else -1
        shift = round(torch.tensor(scales.factor).log2().item())
        form = (codes.num_inputs, codes.num_outputs, codes.bits, codes.group_size, zero, shift, VERSION)
        self._keep(dict(zip(BUFFERS, (high, low, *rows), strict=True)), form)

    @classmethod
    def of_stored(cls, tensors: Mapping[str, Tensor], *rest: Any) -> Self:
        """Return the module of tensors by the names of buffers; `rest` is what the class takes besides codes."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._keep({name: tensors.get(name) for name in BUFFERS}, tensors[FORM].tolist())
        module._finish(*rest)
        return module

    def _finish(self, *rest: Any) -> None:
        """Set what a class has besides codes."""

    def _keep(self, tensors: Mapping[str, Tensor | None], form: Sequence[int]) -> None:
        for name in BUFFERS:
            self.register_buffer(name, _as_bytes(tensors[name]))
        self.register_buffer(FORM, torch.tensor(form, dtype=torch.int32))
        self.sharing: list[AnyPrecisionWeight] = []
        self._norms: Tensor | None = None
        self._laid_out: tuple[int, ...] | None = None
        self._take_form(form)

    def _take_form(self, form: Sequence[int]) -> None:
        """Set what `FORM` tells."""
        self.num_inputs, self.num_outputs, self.bits, self.group_size, zero, shift, _ = form
        self._zero, self._factor = zero, 2.0**shift
        scales = (self._halves(name) for name in BUFFERS[2:])
        scale_bytes = sum(t.nbytes for t in scales if t is not None) / (self.num_inputs * self.steps.shape[1])
        self.channel_bytes = tuple(
            round(self.num_outputs * (self._read_bits(bits) / 8 + scale_bytes)) if bits else 0
            for bits in range(MAX_BITS + 1)
        )
        self._matrix: tuple[tuple[int, ...], Any] | None = None

    def _read_bits(self, bits: int) -> int:
        return planes.HIGH_BITS if bits <= planes.HIGH_BITS else self.bits

    def _halves(self, name: str) -> Tensor | None:
        """Return scales in their own dtype."""
        tensor = self._buffers[name]
        halves = tensor is not None and tensor.dtype == torch.int16
        return tensor.view(torch.float16) if halves else tensor  # type: ignore[union-attr]

    @property
    def unit(self) -> int:
        """Input channels whose codes lie together."""
        return self.high.shape[2]

    @property
    def stored(self) -> StoredMatrix:
        """The matrix as the kernels' operator takes it."""
        tensors: dict[str, Any] = {name: self._halves(name) for name in BUFFERS}
        return StoredMatrix(
            **tensors,
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            bits=self.bits,
            group_size=self.group_size,
            zero=max(self._zero, 0),
            factor=self._factor,
        )

    @property
    def matrix(self) -> Any:
        """The matrix as the kernels read it, where its tensors are now; KernelsUnavailableError without kernels."""
        key = self._addresses
        if self._matrix is None or self._matrix[0] != key:
            self._matrix = key, native_matrix(self.stored)
        return self._matrix[1]

    @property
    def _addresses(self) -> tuple[int, ...]:
        return tuple(0 if t is None else t.data_ptr() for t in self._buffers.values())

    @property
    def is_laid_out(self) -> bool:
        """Whether its tensors are where they were last marked as laid out."""
        return self._laid_out == self._addresses

    def mark_laid_out(self) -> None:
        """Remember that its tensors lie where products read them best."""
        self._laid_out = self._addresses

    @property
    def codes(self) -> GroupedCodes:
        """The matrix."""
        stored = self.stored
        codes = planes.unpack(stored.high, stored.low, self.num_outputs, self.num_inputs)
        return GroupedCodes(codes, self.bits, self.group_size, self._scales(slice(0, self.num_outputs)))

    def _scales(self, outputs: slice | Tensor) -> Scales:
        rows = {name: self._halves(name) for name in BUFFERS[2:]}
        steps, offsets, zeros, block_steps, block_offsets = (
            None if t is None else t[:, outputs].T for t in rows.values()
        )
        assert steps is not None
        zero = zeros if zeros is not None else self._zero if offsets is None else None
        return Scales(steps, zero, offsets, block_steps, block_offsets, self._factor)

    def dequantize(self, bits: int = MAX_BITS, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix as `bits` bits tell it, [out, in]; a cell of codes is read as its middle."""
        weights = torch.empty((self.num_outputs, self.num_inputs), dtype=dtype, device=self.high.device)
        for rows, block in self._blocks(bits):
            weights[rows] = block.to(dtype)
        return weights

    def _blocks(self, bits: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield some outputs, and their weights [n, in] float32, one block after another."""
        high, low = self._buffers["high"], self._buffers["low"]
        assert high is not None
        for first in range(0, high.shape[1], _TILES):
            tiles, begin = slice(first, first + _TILES), first * planes.TILE
            rows = slice(begin, min(begin + _TILES * planes.TILE, self.num_outputs))
            count = rows.stop - rows.start
            codes = planes.unpack(high[:, tiles], None if low is None else low[:, tiles], count, self.num_inputs)
            yield rows, self._levels(codes, self._scales(rows), bits)

    def _levels(self, codes: Tensor, scales: Scales, bits: int) -> Tensor:
        dropped = max(self.bits - bits, 0)
        levels = (codes >> dropped << dropped).float() + (2**dropped - 1) / 2
        return scales.weights_of(levels, self.group_size)

    def rows_of(self, outputs: Tensor) -> Tensor:
        """Return the weights of some outputs [n], [n, in] float32, all bits read."""
        stored = self.stored
        codes = planes.unpack_rows(stored.high, stored.low, outputs, self.num_inputs)
        return self._levels(codes, self._scales(outputs), MAX_BITS)

    @property
    def channel_norms(self) -> Tensor:
        """[in] float32, the Euclidean norm of each input channel's weights."""
        if self._norms is None:
            squares = torch.zeros(self.num_inputs, device=self.high.device)
            for _, block in self._blocks(MAX_BITS):
                squares += block.square().sum(0)
            self._norms = squares.sqrt()
        return self._norms

    @property
    def code_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or a pickle, is made of: all but where the kernels found the tensors of this one."""
        return {**self.__dict__, "_matrix": None, "_laid_out": None}

    def forget_norms(self) -> None:
        """Let channels' norms be taken anew when they are next asked for; they are those of other codes."""
        self._norms = None

    def share(self, other: AnyPrecisionWeight) -> None:
        """Let another module of the same matrix hold the very tensors of this one, wherever both are moved."""
        self.sharing, other.sharing = [other], [self]  # in lists: they are no modules of one another
        other._take(self)

    def _take(self, other: AnyPrecisionWeight) -> None:
        self._buffers.update({name: other._buffers[name] for name in (*BUFFERS, FORM)})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_norms()
        super()._load_from_state_dict(*args, **kwargs)
        form = self.get_buffer(FORM)
        if not form.is_meta:
            self._take_form(form.tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget_norms()  # they stay behind where the buffers move
        moved = super()._apply(fn, recurse)
        for other in self.sharing:
            if other.high.device == self.high.device:  # it was moved there before, with a copy of its own
                self._take(other)
        return moved

    def extra_repr(self) -> str:
        """Return what `print` shows of the module."""
        return f"in={self.num_inputs}, out={self.num_outputs}, bits={self.bits}, group_size={self.group_size}"


def _as_bytes(tensor: Tensor | None) -> Tensor | None:
    """Return half-precision scales as whole numbers of 16 bits: changes of a model's dtype pass them by."""
    return tensor if tensor is None or tensor.dtype != torch.float16 else tensor.view(torch.int16)


class AnyPrecisionLinear(AnyPrecisionWeight):
    """`y = W x + b`, where W [out, in] is read at bits chosen for everything, or per row and input channel."""

    def __init__(self, codes: GroupedCodes, bias: Tensor | None, unit: int | None = None) -> None:
        super().__init__(codes, unit)
        self._finish(bias)

    def _finish(self, *rest: Any) -> None:
        (bias,) = rest
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
                leaves a channel out, and of more than the codes have all are read.
            present: bits above 0 that may be among them.
            kernels: "native" reads the codes themselves where that is possible: in float32 on the CPU, without
                gradients and outside of `keeping_expanded`.

        Returns:
            [..., out] in x's dtype.

        Raises:
            KernelsUnavailableError: "native" is asked for, and there are no kernels.
        """
        rows = x.reshape(-1, self.num_inputs)
        read = kernels == "native" and self._expanded is None and accepts(rows)
        y = self._by_kernels(rows, bits) if read else self._by_bits(rows, bits, present)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.num_outputs)

    def _by_kernels(self, rows: Tensor, bits: int | Tensor) -> Tensor:
        """Return [N, out], by the kernels, past PyTorch's dispatcher."""
        each, uniform = (None, bits) if isinstance(bits, int) else (bits, MAX_BITS)
        check_rows(rows, self.num_inputs, each, uniform)
        return multiply(rows, self.matrix, each, uniform)

    def _by_bits(self, rows: Tensor, bits: int | Tensor, present: Sequence[int]) -> Tensor:
        """Return [N, out], by products with weights expanded to floats."""
        if isinstance(bits, int):
            return rows @ self._weight(bits, rows.dtype).T if bits else rows.new_zeros((len(rows), self.num_outputs))
        by_part = self._by_row if bits.dim() == 1 else self._by_channel
        return by_part(rows, bits, present)

    def _weight(self, bits: int, dtype: torch.dtype) -> Tensor:
        """Return the weights, [out, in]."""
        if self._expanded is None:
            return self.dequantize(bits, dtype)
        if (bits, dtype) not in self._expanded:
            self._expanded[bits, dtype] = self.dequantize(bits, dtype)
        return self._expanded[bits, dtype]

    def _by_row(self, x: Tensor, bits: Tensor, present: Sequence[int]) -> Tensor:
        """Return [N, out]: for each number of bits one product, over the rows that read it."""
        y = x.new_zeros((x.shape[0], self.num_outputs))
        for value in present:
            rows = (bits == value).nonzero().squeeze(-1)
            if len(rows):
                y.index_copy_(0, rows, x.index_select(0, rows) @ self._weight(value, x.dtype).T)
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
                part, weight = torch.where(chosen, x, 0.0), self._weight(value, x.dtype)
                if len(channels) < self.num_inputs:
                    part, weight = part.index_select(1, channels), weight.index_select(1, channels)
                y += part @ weight.T
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

    @property
    def maps(self) -> list[AnyPrecisionLinear]:
        """The maps, in the order of their outputs."""
        return [part for part in self.parts if isinstance(part, AnyPrecisionLinear)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply all parts with all bits: [..., in] to [..., sum of outs]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class AnyPrecisionEmbedding(AnyPrecisionWeight):
    """A table of embeddings [vocab, d] in any-precision codes, all bits read, given out in a dtype.

    They are multiplied by a scale, rounded to that dtype first; transformers looks for it by the attribute's name.
    """

    def __init__(
        self, codes: GroupedCodes, dtype: torch.dtype, scale: float | None = None, unit: int | None = None
    ) -> None:
        super().__init__(codes, unit)
        self._finish(dtype, scale)

    def _finish(self, *rest: Any) -> None:
        dtype, scale = rest
        if scale is not None:
            self.scalar_embed_scale = scale
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)  # follows `.to(dtype)`

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens: [...] to [..., d]."""
        rows = self.rows_of(token_ids.reshape(-1))
        embeddings = rows.to(self.get_buffer("_like").dtype).view(*token_ids.shape, self.num_inputs)
        scale = getattr(self, "scalar_embed_scale", None)
        return embeddings if scale is None else embeddings * torch.tensor(scale, dtype=embeddings.dtype)
