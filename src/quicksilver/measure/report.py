"""Evaluate plans against the dense model and lay the figures out in the stable JSON schema."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, get_args

from quicksilver.core.trace import Trace
from quicksilver.families.cost import executed_cost, kv_read_bytes
from quicksilver.families.spec import ModelSpec
from quicksilver.measure import environment
from quicksilver.measure.scoring import EngineRecord, Mode, run_windows
from quicksilver.measure.statistics import paired_delta, perplexity
from quicksilver.measure.windows import WindowConfig, WindowedText
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.ops import native
from quicksilver.plan import Plan
from quicksilver.rules import Part
from quicksilver.runtime.loop import Decoder

_REDUCTIONS = ("flops", "flops_body", "bitops", "weight_bytes", "kv_read_bytes")


def evaluate(
    model: QuickSilverForCausalLM,
    plans: Sequence[Plan],
    text: WindowedText,
    window_config: WindowConfig,
    mode: Mode = "score",
    name: str = "",
    on_window: Callable[[], None] = lambda: None,
    quantized: QuickSilverForCausalLM | None = None,
) -> list[dict[str, Any]]:
    """Score plans against the dense model on the same windows, interleaved.

    Args:
        model: the model; the plan it carries plays no part.
        plans: what to compare with dense.
        text: windows to score, cut by `window_config`.
        window_config: recorded with the results.
        mode: "score" (one pass) or "decode" (token by token).
        name: of the model, for the report.
        on_window: called after each window that is run, `scoring.num_runs` times.
        quantized: the model with any-precision weights, on which plans that choose bits are run; by default `model`.

    Returns:
        One JSON-ready object per plan, in order.
    """
    chosen = [model if plan.precision is None or quantized is None else quantized for plan in plans]
    decoders = [
        Decoder(each.adapter, plan, each.special_ids)
        for each, plan in zip((model, *chosen), (Plan.dense(), *plans), strict=True)
    ]
    rows = build_rows(run_windows(decoders, text.windows, mode, on_window), text, window_config, mode, name)
    return [
        {**row, "settings": {**_settings(model, each, decoder.plan), "backend": _backend(decoder)}}
        for row, each, decoder in zip(rows, chosen, decoders[1:], strict=True)
    ]


def _backend(decoder: Decoder) -> dict[str, str | None]:
    """Return who ran a plan's layers, and why not a faster one."""
    return {"name": decoder.backend.name, "reason": decoder.backend.reason}


def _settings(dense: QuickSilverForCausalLM, model: QuickSilverForCausalLM, plan: Plan) -> dict[str, Any]:
    """Return which weights dense and plan read, how they were quantized, and what thresholds were fitted to."""
    stored = getattr(model.model.config, "quantization_config", None)
    quantizing = stored and {name: stored[name] for name in ("method", "group_size", "head", "embeddings")}
    fitted = plan.fitted_to
    return {
        "baseline": "nested" if dense.adapter.spec.is_quantized else "plain",
        "nesting": quantizing and {**quantizing, "in_memory": model is not dense},
        "kernels": model.adapter.kernels,
        "instruction_set": native.instruction_set() if model.adapter.kernels == "native" else None,
        "calibration": fitted and {"source": fitted.calibration, "tokens": fitted.tokens, "model": fitted.model},
    }


def build_rows(
    records: Sequence[EngineRecord], text: WindowedText, window_config: WindowConfig, mode: Mode, name: str
) -> list[dict[str, Any]]:
    """Lay out what `run_windows` recorded, the dense baseline first; return one object per plan after it."""
    dense, *accelerated = records
    counts = [window.num_scored for window in text.windows]
    spec = dense.decoder.spec
    shared = {
        "model": _describe_model(spec, name),
        "protocol": {
            "context": window_config.context,
            "stride": window_config.stride,
            "bos": window_config.bos_id is not None,
            "mode": mode,
            "text": text.name,
            "prompt": window_config.prompt,
            "max_tokens": window_config.max_tokens,
            "windows": len(text.windows),
            "scored_bytes": text.scored_bytes,
        },
        "environment": environment.describe(spec.device),
        "tokens_scored": sum(counts),
    }
    dense_side = _side(dense, counts, text.scored_bytes)
    return [
        {
            **shared,
            "plan": record.decoder.plan.to_dict(),
            "dense": dense_side,
            "accelerated": {**side, **_mechanisms(dense, record)},
            "delta": _delta(dense, record, dense_side, side, counts),
        }
        for record in accelerated
        for side in [_side(record, counts, text.scored_bytes)]
    ]


def _describe_model(spec: ModelSpec, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "parameters": spec.parameters,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "weight_bits": spec.weight_bits,
    }


def _side(record: EngineRecord, counts: list[int], scored_bytes: int) -> dict[str, Any]:
    """Return one engine's figures; costs are per token fed (in decode, per step)."""
    spec = record.decoder.spec
    nll = sum(record.nll) / sum(counts)
    cost, fed = executed_cost(spec, record.trace), record.trace.tokens
    rounds = len(record.seconds) / len(counts)
    seconds = sum(record.seconds) / rounds
    return {
        "nll": nll,
        "ppl": perplexity(nll),
        "bits_per_byte": sum(record.nll) / (math.log(2) * scored_bytes),
        "flops_per_token": cost.flops / fed,
        "flops_body_per_token": cost.body_flops / fed,
        "bitops_per_token": cost.bitops / fed,
        "weight_bytes_per_token": cost.weight_bytes / fed,
        "kv_read_bytes_per_token": kv_read_bytes(spec, record.trace) / fed,
        "kv_bytes": statistics.fmean(record.kv_bytes),
        "kv_used_bytes": statistics.fmean(record.kv_used_bytes),
        "seconds": seconds,
        "tokens_per_second": fed / seconds,
    }


def _mechanisms(dense: EngineRecord, record: EngineRecord) -> dict[str, Any]:
    spec, traces = record.decoder.spec, (record.trace, record.prompt_trace)
    fed = sum(trace.tokens for trace in traces)
    return {
        **_what_ran(spec, record.trace),
        "fused_fraction": sum(trace.fused_fraction * trace.tokens for trace in traces) / fed,
        "prompt": _prompt(dense, record),
        **_bits_read(spec, record.trace),
    }


def _bits_read(spec: ModelSpec, trace: Trace) -> dict[str, Any]:
    """Return how many bits of the layers' weights were read: the share of multiply-adds at each, the mean."""
    shares = {str(8 * spec.dtype.itemsize): 1.0} if not spec.is_quantized else {}
    macs, total = trace.macs_by_bits, max(sum(trace.macs_by_bits), 1)
    for bits in range(len(macs) - 1, -1, -1):
        if macs[bits] or bits in (8, 4, 2, 0):
            shares[str(bits)] = macs[bits] / total
    return {"width_histogram": shares, "mean_bits": sum(int(bits) * share for bits, share in shares.items())}


def _what_ran(spec: ModelSpec, trace: Trace) -> dict[str, Any]:
    return {
        "mean_depth": trace.mean_depth,
        "halted_by_layer": [layer.halted for layer in trace.layers],
        "fused_by_layer": [layer.fused for layer in trace.layers],
        "groups_by_size": {str(size): count for size, count in trace.group_sizes.items()},
        "shortcuts_by_layer": {part: _shortcut_shares(trace, part) for part in get_args(Part)},
        "values_read": trace.values_read(spec.num_heads),
        "query_components_read": trace.query_components_read(spec.num_heads, spec.head_dim),
    }


def _shortcut_shares(trace: Trace, part: Part) -> list[float]:
    """Return, for each layer, the share of the tokens that ran it which took the shortcut past a sublayer."""
    return [layer.shortcut_rows[part] / max(layer.query_rows, 1) for layer in trace.layers]


def _prompt(dense: EngineRecord, record: EngineRecord) -> dict[str, Any] | None:
    """Return what feeding the prompts took, where there were any."""
    trace = record.prompt_trace
    if not trace.tokens:
        return None
    ratios = [slow / fast for slow, fast in zip(dense.prompt_seconds, record.prompt_seconds, strict=True)]
    cost = executed_cost(record.decoder.spec, trace)
    baseline = executed_cost(dense.decoder.spec, dense.prompt_trace)
    return {
        "tokens": trace.tokens,
        "fused_fraction": trace.fused_fraction,
        **_what_ran(record.decoder.spec, trace),
        "flops_per_token": cost.flops / trace.tokens,
        "flops_reduction": 1.0 - cost.flops / baseline.flops,
        "speedup": statistics.median(ratios),
    }


def _delta(
    dense: EngineRecord,
    plan: EngineRecord,
    dense_side: dict[str, Any],
    side: dict[str, Any],
    counts: list[int],
) -> dict[str, Any]:
    paired = paired_delta(dense.nll, plan.nll, counts)
    ratios = [slow / fast for slow, fast in zip(dense.seconds, plan.seconds, strict=True)]
    reductions = {
        f"{key}_reduction": 1.0 - side[f"{key}_per_token"] / dense_side[f"{key}_per_token"] for key in _REDUCTIONS
    }
    return {
        "ppl": paired.ppl,
        "ppl_ci95": paired.ppl_ci95 and list(paired.ppl_ci95),
        "nll": paired.nll,
        "nll_ci95": paired.nll_ci95 and list(paired.nll_ci95),
        "kl": plan.kl / sum(counts),
        "top1_agreement": plan.agreed / sum(counts),
        **reductions,
        "kv_bytes_reduction": 1.0 - side["kv_bytes"] / dense_side["kv_bytes"],
        "kv_used_bytes_reduction": 1.0 - side["kv_used_bytes"] / dense_side["kv_used_bytes"],
        "speedup": statistics.median(ratios),
    }
