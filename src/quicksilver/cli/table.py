"""The tables of an evaluation, 80 columns wide: dense first, one row per plan, the settings above them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LEGEND = (
    "FLOPs, body (head left out), bitops, weights read and KV bytes: saved against dense, per token; below zero, the"
    " plan costs more. speed: dense seconds / plan seconds, median over windows run in turn. KL: from the dense"
    " predictions, nats. top-1: same likeliest token. fused: tokens that a later one absorbed, of all fed, prompts"
    " included. bits: read of a weight of the layers, on average."
)
_PARTS_LEGEND = (
    "scores, values: of attention's products with keys, the share that was done; of the values that it weighs, the"
    " share that was read. shortcuts: of the layers' MLPs and attentions, the share that tokens went past. entries:"
    " bits of a number in the cache."
)
_PARTS = frozenset(("attention", "screening", "shortcuts", "entries"))  # of a plan, which the last table is about
_NESTED_BASELINE = "dense is the nested weights ({}), all 8 bits of them read, not the model they were made of"
_PLAIN_BASELINE = "dense is the {} weights as loaded"


def print_table(results: Sequence[dict[str, Any]], file: Any = None, legend: bool = True) -> None:
    """Print evaluation results of one model on one text; `legend` explains the columns below."""
    console, protocol = Console(file=file), results[0]["protocol"]
    for line in _heading(results):
        console.print(line, highlight=False, markup=False)
    plans = [result for result in results if result["plan"]["name"] != "dense"]  # no other plan bears that name
    _print_columns(console, ("ppl", "Δppl [95 % CI]", "Δnll", "KL", "top-1"), _dense_loss(results[0]), plans, _loss)
    _print_columns(
        console, ("layers", "fused", "bits", "FLOPs", "body", "bitops"), _dense_work(results[0]), plans, _work
    )
    _print_columns(console, ("weights", "KV", "speed"), _dense_bytes(results[0]), plans, _bytes)
    inside = [result for result in plans if _PARTS & result["plan"].keys()]
    if inside:
        names = ("scores", "values", "shortcuts", "entries")
        _print_columns(console, names, ["100.0%", "100.0%", "", _entry_bits(results[0], {})], inside, _parts)
    console.print()
    if protocol["prompt"] is not None:
        _print_prompts(console, results)
    elif protocol["mode"] == "score" and any(_fuses_prompts(result["plan"]) for result in results):
        console.print(
            "Scope prompt: without --prompt nothing is a prompt in mode score, so nothing fuses.", highlight=False
        )
    if legend:
        console.print(f"{_LEGEND} {_PARTS_LEGEND}" if inside else _LEGEND, highlight=False)


def number(value: float, sign: str = "") -> str:
    """Return a figure with three decimals, without any from a thousand on, as a power of ten from a million on."""
    size = abs(value)
    return f"{value:{sign}.1e}" if size >= 1e6 else f"{value:{sign}.{0 if size >= 1e3 else 3}f}"


def _print_columns(
    console: Console, names: tuple[str, ...], dense: list[str], plans: Sequence[dict[str, Any]], row: Any
) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("plan", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("dense", *dense)
    for result in plans:
        table.add_row(escape(result["plan"]["name"]), *row(result))
    console.print()
    console.print(table)


def _fuses_prompts(plan: dict[str, Any]) -> bool:
    return plan.get("fusion", {}).get("scope") == "prompt"


def _heading(results: Sequence[dict[str, Any]]) -> list[str]:
    result = results[0]
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
        _baseline(results),
    ]


def _baseline(results: Sequence[dict[str, Any]]) -> str:
    """Say which weights the dense row has read, and which the plans that choose widths."""
    settings = [result["settings"] for result in results]
    nesting = next((each["nesting"] for each in settings if each["nesting"] is not None), None)
    how = "" if nesting is None else f"{nesting['method']}, groups of {nesting['group_size']}"
    if settings[0]["baseline"] == "nested":
        return _NESTED_BASELINE.format(how)
    line = _PLAIN_BASELINE.format(results[0]["model"]["dtype"])
    return line if nesting is None else f"{line}; plans that choose widths read them nested in memory ({how})"


def _dense_loss(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    return [number(dense["ppl"]), f"{dense['bits_per_byte']:.3f} bits/byte", f"{dense['nll']:.4f} nats", "", ""]


def _loss(result: dict[str, Any]) -> list[str]:
    side, delta = result["accelerated"], result["delta"]
    return [
        number(side["ppl"]),
        f"{number(delta['ppl'], '+')} {_interval(delta['ppl_ci95'])}",
        f"{delta['nll']:+.4f}",
        f"{delta['kl']:.4f}",
        f"{delta['top1_agreement']:.1%}",
    ]


def _dense_work(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    return [
        f"{result['model']['layers']}",
        "",
        f"{result['model']['weight_bits']}",
        *(_scaled(dense[f"{key}_per_token"]).rstrip() for key in ("flops", "flops_body", "bitops")),
    ]


def _work(result: dict[str, Any]) -> list[str]:
    side, delta = result["accelerated"], result["delta"]
    return [
        f"{side['mean_depth']:.2f}",
        f"{side['fused_fraction']:.1%}",
        f"{side['mean_bits']:.2f}".removesuffix(".00"),
        *(_saved(delta[f"{key}_reduction"]) for key in ("flops", "flops_body", "bitops")),
    ]


def _dense_bytes(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    return [
        f"{_scaled(dense['weight_bytes_per_token'])}B",
        f"{_scaled(dense['kv_bytes'])}B",
        f"{dense['tokens_per_second']:.0f} tok/s",
    ]


def _bytes(result: dict[str, Any]) -> list[str]:
    delta = result["delta"]
    saved = (_saved(delta[f"{key}_reduction"]) for key in ("weight_bytes", "kv_bytes"))
    return [*saved, f"{delta['speedup']:.2f}x"]


def _parts(result: dict[str, Any]) -> list[str]:
    """Return what attention did and read, how many sublayers tokens went past, and bits of the cache's numbers."""
    side = result["accelerated"]
    past = [share for shares in side["shortcuts_by_layer"].values() for share in shares]
    shares = (side["query_components_read"], side["values_read"], sum(past) / len(past))
    return [*(f"{share:.1%}" for share in shares), _entry_bits(result, result["plan"])]


def _entry_bits(result: dict[str, Any], plan: dict[str, Any]) -> str:
    kept = plan.get("entries")
    return "".join(filter(str.isdigit, result["model"]["dtype"])) if kept is None else str(kept["bits"])


def _print_prompts(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Say what the prompts took, of which the tables show nothing but how much of everything fused."""
    for result in results:
        prompt, name = result["accelerated"]["prompt"], result["plan"]["name"]
        if prompt is not None:
            console.print(
                f"prompts under {name}: {prompt['tokens']} tokens, {prompt['fused_fraction']:.1%} fused,"
                f" FLOPs {_saved(prompt['flops_reduction'])}, {prompt['speedup']:.2f}x",
                highlight=False,
                markup=False,
            )


def _scaled(value: float) -> str:
    """Return three or four digits and a decimal prefix, the space before it included."""
    for prefix in ("", "k", "M", "G"):
        if value < 1e3:
            return f"{value:.{2 if value < 10 else 1}f} {prefix}"
        value /= 1e3
    return f"{value:.1f} T"


def _saved(reduction: float) -> str:
    return f"{round(reduction, 3) + 0.0:+.1%}"  # adding zero turns -0.0 into 0.0


def _interval(bounds: list[float] | None) -> str:
    return escape(f"[{number(bounds[0], '+')}, {number(bounds[1], '+')}]" if bounds else "[n/a]")
