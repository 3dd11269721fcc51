"""A run's trace in the words of a table: what ran, what the dense model would have run, and the difference."""

from __future__ import annotations

from dataclasses import dataclass

from quicksilver.backends.base import LayerBackend
from quicksilver.core.trace import Trace
from quicksilver.families.cost import dense_cost, executed_cost, kv_read_bytes
from quicksilver.families.spec import ModelSpec

_BACKENDS = {"native": "compiled kernels", "pytorch": "PyTorch"}


@dataclass(frozen=True)
class RunStats:
    """Counts of the last run. FLOPs are counted from what ran; `dense_flops` by arithmetic for the same tokens.

    Attributes:
        tokens: tokens fed, prompt and generated.
        mean_depth: layers run per token, on average.
        num_layers: layers of the model.
        halted_by_layer: tokens that halted after each layer.
        fused_by_layer: tokens that a later one absorbed after each layer.
        groups_by_size: groups of fused tokens, by the tokens that they stand for.
        flops: FLOPs executed, head, signals and merging included.
        dense_flops: FLOPs of the dense model for the same tokens.
        weight_bytes_per_token: weight bytes read per token were each decoded alone.
        kv_bytes: bytes allocated in the cache at the end, room to grow included.
        kv_used_bytes: of these, bytes of what is held.
        kv_entries: entries in the cache at the end, over all layers and sequences.
        kv_read_bytes: bytes of keys and values that attention read, over all passes.
        scores_done: share of the multiply-adds of attention scores that were done.
        values_read: share of the values of scored pairs that were read.
        backend: who runs the layers, "native" or "pytorch".
        backend_reason: why not a faster one, None where there is none.
        backend_fallbacks: how many times PyTorch ran a layer in the kernels' place, by why.
    """

    tokens: int
    mean_depth: float
    num_layers: int
    halted_by_layer: tuple[int, ...]
    fused_by_layer: tuple[int, ...]
    groups_by_size: dict[int, int]
    flops: int
    dense_flops: int
    weight_bytes_per_token: float
    kv_bytes: int
    kv_used_bytes: int
    kv_entries: int
    kv_read_bytes: int
    scores_done: float
    values_read: float
    backend: str
    backend_reason: str | None
    backend_fallbacks: dict[str, int]

    @classmethod
    def from_trace(cls, spec: ModelSpec, trace: Trace, backend: LayerBackend) -> RunStats:
        """Summarise a trace of a model that a backend ran."""
        executed, layers = executed_cost(spec, trace), trace.layers
        return cls(
            tokens=trace.tokens,
            mean_depth=trace.mean_depth,
            num_layers=spec.num_layers,
            halted_by_layer=tuple(layer.halted for layer in layers),
            fused_by_layer=tuple(layer.fused for layer in layers),
            groups_by_size=trace.group_sizes,
            flops=executed.flops,
            dense_flops=dense_cost(spec, trace).flops,
            weight_bytes_per_token=executed.weight_bytes / max(trace.tokens, 1),
            kv_bytes=trace.kv_bytes,
            kv_used_bytes=trace.kv_used_bytes,
            kv_entries=trace.kv_entries,
            kv_read_bytes=kv_read_bytes(spec, trace),
            scores_done=trace.query_components_read(spec.num_heads, spec.head_dim),
            values_read=trace.values_read(spec.num_heads),
            backend=backend.name,
            backend_reason=backend.reason,
            backend_fallbacks=dict(trace.fallbacks),
        )

    @property
    def flops_reduction(self) -> float:
        """1 - flops / dense_flops; negative where signals cost more than halting saved."""
        return 1.0 - self.flops / self.dense_flops if self.dense_flops else 0.0

    def summary(self) -> str:
        """Return the counts as a few lines of text."""
        halted, fused = sum(self.halted_by_layer), sum(self.fused_by_layer)
        used, allocated = self.kv_used_bytes / 1e6, self.kv_bytes / 1e6
        attention = f"{self.scores_done:.1%} of scores done, {self.values_read:.1%} of values read"
        reasons = [] if self.backend_reason is None else [self.backend_reason]
        reasons += [f"PyTorch {times} times: {why}" for why, times in self.backend_fallbacks.items()]
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        return "\n".join(
            (
                f"tokens          {self.tokens} ({halted} halted early{f', {fused} fused' if fused else ''})",
                f"mean depth      {self.mean_depth:.2f} of {self.num_layers} layers",
                f"FLOPs           {self.flops:.4g} in all ({self.flops_reduction:+.2%} saved against dense)",
                f"weights read    {self.weight_bytes_per_token / 1e6:.2f} MB per token",
                f"cache           {self.kv_entries} entries, {used:.3f} MB of {allocated:.3f} MB allocated",
                *([f"attention       {attention}"] if self.values_read < 1.0 else []),
                f"layers run by   {_BACKENDS[self.backend]}{reason}",
            )
        )
