"""Ways of choosing quantized 8-bit codes, and of reading their leading bits, by the loss that they cost.

All of them are run by the float engine, on weights that say what the codes mean. Timing is not its subject.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.sweep import heading, interval, read_corpus, text_options, write_results
from quicksilver.calibrate.hessians import collect_hessians
from quicksilver.core.bits import MAX_BITS
from quicksilver.errors import InputError, QuickSilverError
from quicksilver.families.quantize import check, is_inputs_first, part_sizes, quantized_names
from quicksilver.families.registry import adapt
from quicksilver.loading.load import load, load_tokenizer
from quicksilver.measure.report import build_rows
from quicksilver.measure.scoring import run_windows
from quicksilver.measure.windows import Window, WindowConfig, WindowedText, cut, default_bos
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.plan import Plan
from quicksilver.runtime.loop import Decoder
from quicksilver.weights import AnyPrecisionLinear
from quicksilver.weights.codes import BLOCK, GROUP_SIZES, GroupedCodes
from quicksilver.weights.config import LAYERS_ONLY
from quicksilver.weights.rounding import REACH, quantize

BITS = (8, 4, 2)
NARROW = (4, 2)
REACHES = (0.0, REACH, 4.0, 16.0)
FLOAT_BITS = 16  # of a scale or gain that is kept as float16
GRID_BITS = 16  # of a group's step and zero in any-precision codes

PLAIN = ("plain nearest, groups of inputs", "plain nearest, groups of outputs")
MIDDLE = "truncated, middle"
HELD = f"compensated, reach {REACH:g}"  # to the bars
BAR_8 = 0.002  # nats

NOTES = f"""Layers' weights only, every one at the same bits; head and embeddings stay float. The group size of a row
counts adjacent inputs of one output, but for "{PLAIN[1]}". Bars compare means, without their intervals.

Stored: plain rows keep versions apart, each its codes, a float16 scale and a zero of as many bits as a code for each
group. Quantized rows keep 8-bit codes once for all bits, with {GRID_BITS} bits for each group and {FLOAT_BITS} for 256
inputs; read at b bits they take 8 - b bits less, rounded slices one bit more.

- plain nearest: min/max of each group (zero among them), to exactly so many bits; no number of bits is within another.
- truncated, rounded: the leading bits of the nearest 8-bit codes, read in different ways. At 8 bits
  all of them are the same weights, measured once, as "{MIDDLE}".
- rounded slices (MatQuant, Nair et al. 2025): round(q / 2^(8-r)), halves up, at most 2^r - 1, times 2^(8-r). Such a
  code is not a prefix: the bit after it says whether to round up, so it must be read too, or the codes kept apart.
- compensated: error-compensated codes (GPTQ's walk, twice); reach is how far, in 8-bit
  steps, a weight may lie outside the cell that its 4-bit version chooses."""

Read = Callable[[Tensor, int, Tensor], dict[int, Tensor]]
"""Maps a weight [out, in], a group size and a Hessian [in, in] to what each number of bits tells of the weight."""

Stored = Callable[[tuple[int, int], int, int], int]
"""Maps a shape (out, in), a group size and a number of bits to the bits kept to read a matrix at it."""


class Method(NamedTuple):
    """A way of choosing codes and reading them."""

    name: str
    read: Read
    stored: Stored


def plain(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Return the levels nearest to a weight [out, in], each group of adjacent inputs from its least to its greatest.

    Zero is always a level, as GPTQ's quantizer has it.
    """
    return torch.cat([_plain_group(part, 2**bits - 1) for part in weight.split(group_size, dim=1)], dim=1)


def _plain_group(part: Tensor, top: int) -> Tensor:
    low, high = part.amin(1, keepdim=True).clamp(max=0.0), part.amax(1, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    return scale * ((part / scale + zero).round().clamp(0, top) - zero)


def rounded_slices(codes: Tensor, bits: int) -> Tensor:
    """Return 8-bit codes rounded to the nearest of `bits` bits, in units of 8-bit codes.

    The formula is MatQuant's (Nair et al. 2025), halves rounded up.
    """
    cell = 2 ** (MAX_BITS - bits)
    return ((codes.int() + cell // 2) // cell).clamp(max=2**bits - 1) * cell


def lower_edges(codes: Tensor, bits: int) -> Tensor:
    """Return the least 8-bit code with the same leading bits as each code."""
    cell = 2 ** (MAX_BITS - bits)
    return codes.int() // cell * cell


def _plain_inputs(weight: Tensor, group_size: int, _hessian: Tensor) -> dict[int, Tensor]:
    return {bits: plain(weight, group_size, bits) for bits in BITS}


def _plain_outputs(weight: Tensor, group_size: int, _hessian: Tensor) -> dict[int, Tensor]:
    return {bits: plain(weight.T, group_size, bits).T for bits in BITS}


def _levels(
    of: Callable[[Tensor, int], Tensor], weight: Tensor, group_size: int, _hessian: Tensor
) -> dict[int, Tensor]:
    """Read the nearest 8-bit codes by what `of` makes of them at a number of bits, in units of codes."""
    made = quantize(weight, group_size)
    return {bits: made.scales.weights_of(of(made.codes, bits).float(), group_size) for bits in NARROW}


def _middles(weight: Tensor, group_size: int, _hessian: Tensor) -> dict[int, Tensor]:
    return _read(quantize(weight, group_size))


def _compensated(reach: float, weight: Tensor, group_size: int, hessian: Tensor) -> dict[int, Tensor]:
    return _read(quantize(weight, group_size, hessian, reach=reach))


def _read(codes: GroupedCodes) -> dict[int, Tensor]:
    module = AnyPrecisionLinear(codes, None)
    return {each: module.dequantize(each) for each in BITS}


def _stored_by_inputs(shape: tuple[int, int], group_size: int, bits: int) -> int:
    return bits * math.prod(shape) + (FLOAT_BITS + bits) * _num_groups(shape, group_size)


def _stored_by_outputs(shape: tuple[int, int], group_size: int, bits: int) -> int:
    return _stored_by_inputs((shape[1], shape[0]), group_size, bits)


def _stored_quantized(shape: tuple[int, int], group_size: int, _bits: int) -> int:
    of_scales = GRID_BITS * _num_groups(shape, group_size) + FLOAT_BITS * _num_groups(shape, BLOCK)
    return MAX_BITS * math.prod(shape) + of_scales


def _num_groups(shape: tuple[int, int], group_size: int) -> int:
    return shape[0] * -(-shape[1] // group_size)


METHODS = (
    Method(PLAIN[0], _plain_inputs, _stored_by_inputs),
    Method(PLAIN[1], _plain_outputs, _stored_by_outputs),
    Method("truncated, lower edge", partial(_levels, lower_edges), _stored_quantized),
    Method(MIDDLE, _middles, _stored_quantized),
    Method("rounded slices (MatQuant)", partial(_levels, rounded_slices), _stored_quantized),
    *(Method(f"compensated, reach {reach:g}", partial(_compensated, reach), _stored_quantized) for reach in REACHES),
)


def matrices(model: Any) -> list[tuple[str, Tensor]]:
    """Return the matrices that would be quantized, in order: a map's name and [out, in], the weights themselves."""
    found: list[tuple[str, Tensor]] = []
    for name in quantized_names(model):
        weight = model.get_submodule(name).weight.detach()
        whole = weight.T if is_inputs_first(model, name) else weight
        found += [(name, part) for part in whole.split(part_sizes(model, name))]
    return found


def fill(
    copies: Mapping[int, Any], model: Any, method: Method, group_size: int, hessians: Mapping[str, Tensor]
) -> dict[int, float]:
    """Write what a method tells of a model's weights into its copies, one for each number of bits.

    Returns:
        The bits stored per weight, for each number of bits that the method has.
    """
    targets = {bits: matrices(each) for bits, each in copies.items()}
    stored, count = Counter[int](), 0
    for i, (name, weight) in enumerate(matrices(model)):
        count += weight.numel()
        for bits, told in method.read(weight.float(), group_size, hessians[name]).items():
            targets[bits][i][1].copy_(told)
            stored[bits] += method.stored((weight.shape[0], weight.shape[1]), group_size, bits)
    return {bits: total / count for bits, total in stored.items()}


def measure(
    model: QuickSilverForCausalLM,
    name: str,
    group_sizes: Sequence[int],
    calibration: Sequence[Window],
    text: WindowedText,
    window_config: WindowConfig,
) -> list[dict[str, Any]]:
    """Return a row for each group size, method and bits; the model stays as it is."""
    hessians = collect_hessians(model.model, [window.token_ids for window in calibration])
    copies = {bits: copy.deepcopy(model.model) for bits in BITS}
    rows: list[dict[str, Any]] = []
    for group_size in group_sizes:
        for method in METHODS:
            stored = fill(copies, model.model, method, group_size, hessians)
            plans = [Plan.dense().renamed(f"{method.name}/{bits} bits/groups of {group_size}") for bits in stored]
            adapters = [adapt(copies[bits]) for bits in stored]
            decoders = [Decoder(adapter, plan) for adapter, plan in zip(adapters, plans, strict=True)]
            records = run_windows([Decoder(model.adapter, Plan.dense()), *decoders], text.windows, "score")
            print(".", end="", file=sys.stderr, flush=True)
            built = build_rows(records, text, window_config, "score", name)
            for (bits, size), row in zip(stored.items(), built, strict=True):
                facts = {"group_size": group_size, "method": method.name, "bits": bits, "stored_bits_per_weight": size}
                rows.append({**_losses(row), **facts})
    return rows


def _losses(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without costs and times, which are those of float weights."""
    sides = {
        side: {key: row[side][key] for key in ("nll", "ppl", "bits_per_byte")} for side in ("dense", "accelerated")
    }
    kept = ("nll", "nll_ci95", "ppl", "ppl_ci95", "kl", "top1_agreement")
    return {**row, **sides, "delta": {key: row["delta"][key] for key in kept}}


def verdict(rows: Sequence[dict[str, Any]], group_size: int) -> str:
    """Return in words whether the library's codes meet the bars at a group size."""
    loss = {(row["method"], row["bits"]): row["delta"]["nll"] for row in rows if row["group_size"] == group_size}
    eight, four, best = loss[HELD, 8], loss[HELD, 4], min(loss[name, 4] for name in PLAIN)
    return (
        f"Groups of {group_size}, {HELD}: 8 bits {eight:+.4f} nats, bar {BAR_8:+.4f}:"
        f" {'met' if eight <= BAR_8 else 'MISSED'}; 4 bits {four:+.4f} nats, bar the better plain nearest, {best:+.4f}:"
        f" {'met' if four <= best else 'MISSED'}."
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of a run, the settings above it, and the bars and what to mind below it."""
    sizes = dict.fromkeys(row["group_size"] for row in rows)
    lines = [
        *heading(rows[0], f"; Hessians from {rows[0]['calibration']}"),
        "| group | method | bits | stored bits per weight | Δnll [95 % CI] | Δppl | KL | top-1 |",
        "|---" * 8 + "|",
        *map(_table_row, rows),
        "",
        *(f"{verdict(rows, size)}\n" for size in sizes),
        NOTES,
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    delta = row["delta"]
    return (
        f"| {row['group_size']} | {row['method']} | {row['bits']} | {row['stored_bits_per_weight']:.3f}"
        f" | {interval(delta)} | {delta['ppl']:+.3f} | {delta['kl']:.4f} | {delta['top1_agreement']:.1%} |"
    )


@click.command()
@click.argument("model")
@text_options
@click.option("--group-size", "group_sizes", multiple=True, type=click.Choice(GROUP_SIZES), default=GROUP_SIZES)
@click.option("--context", default=512, show_default=True)
@click.option("--max-tokens", default=10_000, show_default=True)
@click.option("--calibration-tokens", default=16_384, show_default=True)
@click.option("-o", "--output", required=True, help="Results: OUTPUT.json and OUTPUT.md.")
def main(
    model: str,
    text: str | None,
    documents: str | None,
    calibration_text: str | None,
    calibration_documents: str | None,
    group_sizes: tuple[int, ...],
    context: int,
    max_tokens: int,
    calibration_tokens: int,
    output: str,
) -> None:
    """Compare ways of choosing and reading any-precision codes of MODEL's weights with the float model.

    \b
    Example:
      python -m benchmarks.rounding ref-llama --text test.txt --calibration-text holdout.txt -o rounding
    """
    try:
        loaded, tokenizer = load(model), load_tokenizer(model)
        check(loaded.model, LAYERS_ONLY)
        window_config = WindowConfig(context, context // 2, default_bos(tokenizer), max_tokens)
        measured = cut(read_corpus(text, documents), tokenizer, window_config)
        held = read_corpus(calibration_text, calibration_documents)
        calibration = cut(
            held, tokenizer, replace(window_config, stride=window_config.room, max_tokens=calibration_tokens)
        )
        if context > loaded.adapter.spec.max_positions:
            raise InputError(f"a context of {context} is more than the model's {loaded.adapter.spec.max_positions}")
    except QuickSilverError as error:
        raise click.UsageError(str(error)) from None
    name = Path(model).name
    rows = measure(loaded, name, tuple(dict.fromkeys(group_sizes)), calibration.windows, measured, window_config)
    rows = [{**row, "calibration": f"{held.name}, {calibration_tokens} tokens"} for row in rows]
    write_results(output, rows, markdown(rows))


if __name__ == "__main__":
    main()
