"""Seconds of attention alone for one decoded token: `python -m benchmarks.attention [OPTIONS]`.

Entries of 32, 16 and 8 bits by the compiled kernels beside PyTorch's fused attention in float32, in turn in one
process. Each has as many layers as it takes for their entries not to stay in the processor's caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import Measurement, append, find, ratio_to_baseline, to_rows
from benchmarks.timing import Case, interleaved
from quicksilver.cache.coded import encode
from quicksilver.ops import native

BASELINE = "torch-sdpa"
RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
_COLD_BYTES = 1 << 26  # of float32 entries, over all layers
_TOLERANCE = {32: 1e-5, 16: 2e-2, 8: 3e-2}  # of attended values, which are means of normal numbers


class Shape(NamedTuple):
    """Heads of a model's attention."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64),
    "qwen2.5-0.5b": Shape(14, 2, 64),
    "qwen2.5-1.5b": Shape(12, 2, 128),
    "gpt2": Shape(12, 12, 64),
    "ref-llama": Shape(4, 2, 32),
}


def by_torch(query: Tensor, layers: list[tuple[Tensor, Tensor]], shape: Shape) -> Tensor:
    """Return what a query [heads, head_dim] attends to in the last layer, having attended in all."""
    grouped, out = query.view(shape.kv_heads, 1, -1, shape.head_dim), query
    for keys, values in layers:
        key, value = keys.transpose(0, 1)[:, None], values.transpose(0, 1)[:, None]
        out = F.scaled_dot_product_attention(grouped, key, value)
    return out.reshape(shape.heads, shape.head_dim)


def by_kernels(query: Tensor, layers: list[tuple[Tensor, Tensor]], shape: Shape, bits: int) -> Callable[[], Tensor]:
    """Return a function that does the same over entries kept in some bits."""
    kept: list[tuple[Tensor | None, ...]] = []  # keys, values, their scales
    for keys, values in layers:
        if bits == 8:
            (keys, key_scales), (values, value_scales) = encode(keys), encode(values)
            kept.append((keys, values, key_scales, value_scales))
        else:
            dtype = torch.float32 if bits == 32 else torch.bfloat16
            kept.append((keys.to(dtype), values.to(dtype), None, None))
    places = [0 if each is None else each.data_ptr() for of in kept for each in (*of, None)]
    seen, out = [0, 0, len(layers[0][0])], torch.empty_like(query)
    options = 1, shape.head_dim**-0.5, 0.0, 1.0, 0.0, torch.get_num_threads()

    def attend() -> Tensor:
        assert kept
        native.extension().attend(query.data_ptr(), out.data_ptr(), *shape, bits, seen, places, *options)
        return out

    return attend


def measure(name: str, entries: int, arguments: argparse.Namespace) -> list[Measurement]:
    """Return the seconds of each engine for one token after so many; ValueError where one attends to something else."""
    shape = SHAPES[name]
    layer_bytes = 2 * entries * shape.kv_heads * shape.head_dim * torch.float32.itemsize
    num_layers = min(max(-(-_COLD_BYTES // layer_bytes), 2), 64)
    generator = torch.Generator().manual_seed(0)
    size = 2, entries, shape.kv_heads, shape.head_dim
    layers = [tuple(torch.randn(size, generator=generator)) for _ in range(num_layers)]
    query = torch.randn(shape.heads, shape.head_dim, generator=generator)
    work: dict[str, Callable[[], Any]] = {BASELINE: partial(by_torch, query, layers, shape)}
    wanted = work[BASELINE]()
    for bits in (32, 16, 8):
        work[f"kernels-{bits}"] = attend = by_kernels(query, layers, shape, bits)
        error = float((attend() - wanted).abs().max())
        if not error < _TOLERANCE[bits]:
            raise ValueError(f"{name}, {entries} entries of {bits} bits: attended values are off by {error:.2g}")
    cases = [Case(engine, lambda: None, lambda _, run=run: run()) for engine, run in work.items()]
    taken = interleaved(cases, arguments.repeats, arguments.warmup)
    return [
        Measurement(
            f"{name}, {entries} entries",
            engine,
            BASELINE,
            "seconds per token and layer",
            tuple(each / num_layers for each in values),
            {"shape": shape._asdict(), "entries": entries, "layers": num_layers},
        )
        for engine, values in taken.items()
    ]


def show(measurements: list[Measurement]) -> None:
    """Print a line for each task: microseconds and, beside them, PyTorch's time over the kernels'."""
    for task in dict.fromkeys(each.task for each in measurements):
        of = [each for each in measurements if each.task == task]
        torchs = sorted(find(of, task, BASELINE).values)[len(of[0].values) // 2] * 1e6
        ours = [
            f"{each.engine} {sorted(each.values)[len(each.values) // 2] * 1e6:.1f}"
            f" ({1 / ratio_to_baseline(each, of).median:.2f})"
            for each in of
            if each.engine != BASELINE
        ]
        print(f"{task}: {BASELINE} {torchs:.1f} us a layer; {', '.join(ours)}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--entries", nargs="+", type=int, default=[64, 256, 2048, 8192, 16384])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="instruction set of the kernels, instead of the best one")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.isa:
        native.use_instruction_set(options.isa)
    measurements: list[Measurement] = []
    with torch.inference_mode():
        for name in options.shapes:
            for entries in options.entries:
                try:
                    taken = measure(name, entries, options)
                except ValueError as error:
                    sys.exit(str(error))
                show(taken)
                measurements += taken
    shared = {"settings": {**vars(options), "output": str(options.output)}, "instruction_set": native.instruction_set()}
    append(options.output, to_rows("attention", measurements, shared, torch.device("cpu")))


if __name__ == "__main__":
    main()
