"""What a run cost: FLOPs, bit operations and bytes, by arithmetic over its trace.

2 FLOPs per multiply-add. Weight matrices, attention pairs, the head, signals and merging count; norms,
activations and residual additions count on neither side.
"""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver.core.trace import Trace
from quicksilver.models.spec import ModelSpec


@dataclass(frozen=True)
class Cost:
    """Work of a run or of its dense counterpart, in total over its tokens.

    Attributes:
        body_macs: multiply-adds of the layers, of signals and of merging.
        head_macs: multiply-adds of the head for logits.
        weight_bytes: weight bytes that the tokens would read were each decoded alone.
        weight_bits: bits of one weight.
    """

    body_macs: int
    head_macs: int
    weight_bytes: int
    weight_bits: int

    @property
    def flops(self) -> int:
        """FLOPs, head included."""
        return 2 * (self.body_macs + self.head_macs)

    @property
    def body_flops(self) -> int:
        """FLOPs without the head's logits."""
        return 2 * self.body_macs

    @property
    def bitops(self) -> int:
        """Multiply-adds x weight bits x activation bits."""
        return (self.body_macs + self.head_macs) * self.weight_bits**2


def signal_macs(spec: ModelSpec, signal: str) -> int:
    """Return the multiply-adds that one row (or pair of rows) of a signal takes."""
    if signal == "head":
        return spec.head_macs + 2 * spec.vocab_size  # softmax and the sum of p log p
    if signal == "key":
        return 2 * spec.num_kv_heads * spec.head_dim + 4 * spec.head_dim  # means over heads, then their cosine
    return {"norm": 2, "cosine": 4, "mean": 1}[signal] * spec.hidden_size


def executed_cost(spec: ModelSpec, trace: Trace) -> Cost:
    """Return what the traced run computed."""
    macs = weight_bytes = 0
    for layer in trace.layers:
        macs += layer.query_rows * spec.layer_macs + layer.fill_rows * spec.kv_macs
        macs += layer.attended.value * spec.attention_macs_per_pair
        macs += sum(rows * signal_macs(spec, signal) for signal, rows in layer.signal_rows.items())
        weight_bytes += layer.query_rows * spec.layer_weight_bytes + layer.fill_rows * spec.kv_weight_bytes
        weight_bytes += layer.signal_rows["head"] * spec.head_weight_bytes
    weight_bytes += trace.head_rows * spec.head_weight_bytes
    return Cost(macs, trace.head_rows * spec.head_macs, weight_bytes, 8 * spec.dtype.itemsize)


def dense_cost(spec: ModelSpec, trace: Trace) -> Cost:
    """Return what the dense model would have computed for the same tokens, by arithmetic."""
    macs = trace.tokens * spec.num_layers * spec.layer_macs
    macs += trace.dense_attended * spec.num_layers * spec.attention_macs_per_pair
    weight_bytes = trace.tokens * spec.num_layers * spec.layer_weight_bytes
    weight_bytes += trace.head_rows * spec.head_weight_bytes
    return Cost(macs, trace.head_rows * spec.head_macs, weight_bytes, 8 * spec.dtype.itemsize)
