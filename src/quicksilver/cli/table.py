"""The table of an evaluation: dense first, one row per plan, the settings above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDTH = 180
_COLUMNS = (
    "plan",
    "ppl",
    "Δppl [95 % CI]",
    "Δnll",
    "KL",
    "top-1",
    "layers",
    "fused",
    "bits",
    "FLOPs",
    "body",
    "bitops",
    "weights",
    "KV",
    "speed",
)


def print_table(results: Sequence[dict[str, Any]], file: Any = None, legend: bool = True) -> None:
    """Print evaluation results of one model on one text; `legend` explains the columns below."""
    console, protocol = Console(file=file), results[0]["protocol"]
    if not console.is_terminal:
        console = Console(file=file, width=_WIDTH)
    for line in _heading(results[0]):
        console.print(line, highlight=False, markup=False)
    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    table.add_row(*_dense_row(results[0]))
    for result in results:
        if result["plan"]["halting"] is not None or {"fusion", "precision"} & result["plan"].keys():
            table.add_row(*_plan_row(result))
    console.print(table)
    if protocol["prompt"] is not None:
        _print_prompts(console, results)
    elif protocol["mode"] == "score" and any(_fuses_prompts(result["plan"]) for result in results):
        console.print(
            "Scope prompt: without --prompt nothing is a prompt in mode score, so nothing fuses.", highlight=False
        )
    if legend:
        _print_legend(console)


def _fuses_prompts(plan: dict[str, Any]) -> bool:
    return plan.get("fusion", {}).get("scope") == "prompt"


def _print_legend(console: Console) -> None:
    console.print(
        "FLOPs, body (head left out), bitops, weights read and KV bytes: saved against dense, per token; below zero,"
        " the plan costs more.\nspeed: dense seconds / plan seconds, median over windows run in turn. KL: from the"
        " dense predictions, nats. top-1: same likeliest token.\nfused: tokens that a later one absorbed, of all fed,"
        " prompts included. bits: read of a weight of the layers, on average.",
        highlight=False,
    )


def _heading(result: dict[str, Any]) -> list[str]:
    model, protocol, env = result["model"], result["protocol"], result["environment"]
    scored = f"{result['tokens_scored']} tokens scored in {protocol['windows']} windows"
    bos = "BOS before each window" if protocol["bos"] else "no BOS"
    prompt = "" if protocol["prompt"] is None else f", after a prompt of {protocol['prompt']}"
    return [
        f"{model['name']} ({model['family']}, {model['layers']} layers, {model['parameters'] / 1e6:.1f}M parameters,"
        f" {model['dtype']}) on {protocol['text']}: {scored}",
        f"context {protocol['context']}, stride {protocol['stride']}, {bos}, mode {protocol['mode']}{prompt};"
        f" {env['device']}, {env['threads']} threads, {env['cpu']}, torch {env['torch']},"
        f" transformers {env['transformers']}",
    ]


def _dense_row(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    return [
        "dense",
        f"{dense['ppl']:.3f}",
        f"{dense['bits_per_byte']:.3f} bits/byte",
        f"{dense['nll']:.4f} nats",
        "",
        "",
        f"{result['model']['layers']}",
        "",
        f"{result['model']['weight_bits']}",
        f"{dense['flops_per_token'] / 1e6:.2f} M",
        f"{dense['flops_body_per_token'] / 1e6:.2f} M",
        f"{dense['bitops_per_token'] / 1e9:.2f} G",
        f"{dense['weight_bytes_per_token'] / 1e6:.2f} MB",
        f"{dense['kv_bytes'] / 1e3:.0f} kB",
        f"{dense['tokens_per_second']:.0f} tok/s",
    ]


def _plan_row(result: dict[str, Any]) -> list[str]:
    side, delta = result["accelerated"], result["delta"]
    return [
        escape(result["plan"]["name"]),
        f"{side['ppl']:.3f}",
        f"{delta['ppl']:+.3f} {_interval(delta['ppl_ci95'])}",
        f"{delta['nll']:+.4f}",
        f"{delta['kl']:.4f}",
        f"{delta['top1_agreement']:.1%}",
        f"{side['mean_depth']:.2f}",
        f"{side['fused_fraction']:.1%}",
        f"{side['mean_bits']:.2f}".removesuffix(".00"),
        *(_saved(delta[f"{key}_reduction"]) for key in ("flops", "flops_body", "bitops", "weight_bytes", "kv_bytes")),
        f"{delta['speedup']:.2f}x",
    ]


def _print_prompts(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Say what the prompts took, of which the table shows nothing but how much of everything fused."""
    for result in results:
        prompt, name = result["accelerated"]["prompt"], result["plan"]["name"]
        if prompt is not None:
            console.print(
                f"prompts under {name}: {prompt['tokens']} tokens, {prompt['fused_fraction']:.1%} fused,"
                f" FLOPs {_saved(prompt['flops_reduction'])}, {prompt['speedup']:.2f}x",
                highlight=False,
                markup=False,
            )


def _saved(reduction: float) -> str:
    return f"{round(reduction, 3) + 0.0:+.1%}"  # adding zero turns -0.0 into 0.0


def _interval(bounds: list[float] | None) -> str:
    return escape(f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else "[n/a]")
