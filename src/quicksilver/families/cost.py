"""What a run cost: FLOPs, bit operations and bytes, by arithmetic over its trace.

2 FLOPs per multiply-add. Weight matrices, attention pairs, the head, signals, fitted maps and merging count; norms,
activations, bounds, factors, residual additions and what the softmax does to weights (leaving some out included) count
on neither side. Estimating weights counts: a query's mean square, and a softmax that dense does not make. Keys
and values kept as codes are multiplied as codes: each of their scales takes one multiplication for each score, for each
score completed in a second step, and for each value read.
"""

from dataclasses import dataclass

from quicksilver.cache.coded import num_scales
from quicksilver.core.bits import ENTRY_BITS
from quicksilver.core.trace import LayerCounts, Trace
from quicksilver.families.spec import ENTRY, MLP, QUERY, LayerSpec, ModelSpec

_NORM_BYTES = 4  # of a channel's norm, float32: one for each channel that is scored


@dataclass(frozen=True)
class Cost:
    """Work of a run or of its dense counterpart, in total over its tokens."""

    body_macs: int  # multiply-adds of the layers, of signals, of fitted maps and of merging
    head_macs: int  # multiply-adds of the head for logits
    # weight bytes that the tokens would read were each decoded alone, the norms of weights that a bits rule's score
    # reads among them
    weight_bytes: int
    bitops: int  # multiply-adds x weight bits x activation bits; where both sides are activations, their bits twice

    @property
    def flops(self) -> int:
        """FLOPs, head included."""
        return 2 * (self.body_macs + self.head_macs)

    @property
    def body_flops(self) -> int:
        """FLOPs without the head's logits."""
        return 2 * self.body_macs


def signal_macs(spec: ModelSpec, signal: str) -> int:
    """Return the multiply-adds that one row (or pair of rows) of a signal takes."""
    if signal == "head":
        return spec.head_macs + 2 * spec.vocab_size  # softmax and the sum of p log p
    if signal == "score":
        return 1  # of one channel
    if signal == "entry":
        return 2 * 2 * spec.num_kv_heads * spec.head_dim  # of key and value: the largest magnitude, then the codes
    if signal == "query":
        return spec.num_heads * spec.head_dim
    return {"norm": 2, "cosine": 4, "mean": 1, "softmax": 2}[signal] * spec.hidden_size


def executed_cost(spec: ModelSpec, trace: Trace) -> Cost:
    """Return what the traced run computed."""
    activation_bits = 8 * spec.dtype.itemsize
    entry_bits = activation_bits if trace.entry_bits is None else trace.entry_bits
    coded = trace.entry_bits == ENTRY_BITS
    macs = weight_bytes = bitops = 0
    for layer, of_layer in zip(trace.layers, spec.layers, strict=True):
        linear = layer.query_rows * of_layer.macs_of() + layer.fill_rows * of_layer.macs_of(*ENTRY)
        linear -= layer.skipped_mlp * of_layer.macs_of(*MLP) + layer.skipped_attention * of_layer.macs_of(*QUERY)
        by_bits = layer.macs_by_bits
        linear -= by_bits[0]
        read = (
            sum(bits * count for bits, count in enumerate(by_bits)) if spec.is_quantized else linear * spec.weight_bits
        )
        signals = {signal: rows * signal_macs(spec, signal) for signal, rows in layer.signal_rows.items()}
        of_head = signals.get("head", 0)
        attention = layer.attended * spec.attention_macs_per_pair
        attention -= layer.values_skipped * spec.head_dim + layer.scores_skipped
        other = sum(signals.values()) - of_head + layer.rule_macs + layer.fitted_macs
        if layer.signal_query:
            other += spec.num_heads * layer.attended  # the softmax that estimates weights
        if coded:  # products with scales
            scaled = 2 * spec.num_heads * layer.attended - layer.values_skipped + layer.scored_twice
            other += num_scales(spec.head_dim) * scaled
        macs += linear + of_head + attention + other
        read += of_head * spec.head_bits + attention * entry_bits + other * activation_bits
        bitops += read * activation_bits
        weight_bytes += _weight_bytes(spec, of_layer, layer)
    weight_bytes += trace.head_rows * spec.head_weight_bytes
    head_macs = trace.head_rows * spec.head_macs
    return Cost(macs, head_macs, weight_bytes, bitops + head_macs * spec.head_bits * activation_bits)


def _weight_bytes(spec: ModelSpec, of_layer: LayerSpec, layer: LayerCounts) -> int:
    """Return the weight bytes read in a layer and after it."""
    plain = layer.query_rows * of_layer.weight_bytes + layer.fill_rows * of_layer.bytes_of(*ENTRY)
    plain -= layer.skipped_mlp * of_layer.bytes_of(*MLP) + layer.skipped_attention * of_layer.bytes_of(*QUERY)
    signals = layer.signal_head * spec.head_weight_bytes + layer.signal_score * _NORM_BYTES
    return plain + layer.weight_bytes + layer.fitted_bytes + signals


def dense_cost(spec: ModelSpec, trace: Trace) -> Cost:
    """Return what the dense model would have computed for the same tokens, by arithmetic."""
    activation_bits = 8 * spec.dtype.itemsize
    linear = trace.tokens * spec.macs
    attention = sum(trace.dense_pairs(layer.window) for layer in spec.layers) * spec.attention_macs_per_pair
    head_macs = trace.head_rows * spec.head_macs
    weight_bytes = trace.tokens * sum(layer.weight_bytes + layer.quantized_weight_bytes for layer in spec.layers)
    weight_bytes += trace.head_rows * spec.head_weight_bytes
    read = linear * spec.weight_bits + attention * activation_bits + head_macs * spec.head_bits
    return Cost(linear + attention, head_macs, weight_bytes, read * activation_bits)


def kv_read_bytes(spec: ModelSpec, trace: Trace) -> int:
    """Return the bytes of keys and values, and of their scales, that attention read in the traced run."""
    return trace.entries_read * spec.cache_shape(trace.entry_bits).entry_bytes
