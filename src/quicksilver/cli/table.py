"""The tables of an evaluation, 80 columns wide: dense first, one row per plan, the settings above them."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

EXPLANATION = """\
The row `dense` shows what the dense model takes; the rows of plans show the
shares that they save of it, and below zero take more. FLOPs, bitops and weights
are per token.

ppl                   perplexity of the scored tokens
Δppl [95 % CI]        added to dense's; paired bootstrap over windows
Δnll [nats]           added to dense's mean loss per token
FLOPs saved           maps, gates, scores and the head included
in the layers         FLOPs saved of those of the layers: the head left out
KL [nats]             mean KL(dense || plan) of the predictions
top-1 same            tokens whose likeliest continuation is dense's
bitops saved          multiply-adds x weight bits x activation bits
weights saved         bytes of weights read
KV cache saved        bytes of keys and values kept
speed [x dense]       dense seconds / plan seconds, median over windows that
                      both run in turn: whole windows in --mode score, token by
                      token, as in generation, in --mode decode
layers run            by a token, on average
tokens fused          absorbed by a later one, of all fed, prompts included
weight bits           read of a weight of the layers, on average
scores done           of attention's products with keys
values read           of those that attention weighs
MLP, attn. skipped    sublayers that tokens skipped, of all in the layers
cache bits            of a number in the cache
prompts               with --prompt: what was fed before the tokens scored, of
                      which the other tables hold only the tokens fused

How each is counted: docs/measuring.md. All figures: --json."""
_LEGEND = (
    "saved: of what the dense row shows, per token; below zero, the plan takes more.",
    "speed: {}. More: eval --explain.",
)
_SPEED = {"score": "of whole windows; of generation: --mode decode", "decode": "token by token, as in generation"}
_LOSS = ("ppl", "Δppl [95 % CI]", "Δnll\n[nats]", "FLOPs\nsaved", "in the\nlayers")
_COST = ("KL\n[nats]", "top-1\nsame", "bitops\nsaved", "weights\nsaved", "KV cache\nsaved", "speed\n[x dense]")
_RAN = ("layers\nrun", "tokens\nfused", "weight\nbits")
_PROMPTS = ("tokens", "tokens\nfused", "FLOPs\nsaved", "speed\n[x dense]")
_PARTS_RAN = ("scores\ndone", "values\nread", "MLP, attn.\nskipped", "cache\nbits")
_QUANTIZED_BASELINE = (
    "dense is the any-precision weights ({}), all 8 bits of them read, not the model they were made of"
)
_PLAIN_BASELINE = "dense is the {} weights as loaded"


def print_table(results: Sequence[dict[str, Any]], file: Any = None, legend: bool = True) -> None:
    """Print evaluation results of one model on one text; `legend` says below how the columns are to be read."""
    console, protocol = Console(file=file), results[0]["protocol"]
    for line in _heading(results):
        console.print(line, highlight=False, markup=False)
    plans = [result for result in results if result["plan"]["name"] != "dense"]  # no other plan bears that name
    _print_columns(console, _LOSS, _dense_loss(results[0]), plans, _loss)
    _print_columns(console, _COST, _dense_cost(results[0]), plans, _cost)
    if any(_reads_less(result["plan"]) for result in plans):
        dense = [*_dense_ran(results[0]), "100.0%", "100.0%", "", _entry_bits(results[0], {})]
        _print_columns(console, (*_RAN, *_PARTS_RAN), dense, plans, lambda result: [*_ran(result), *_parts(result)])
    else:
        _print_columns(console, _RAN, _dense_ran(results[0]), plans, _ran)
    if protocol["prompt"] is not None:
        tokens = [f"{results[0]['accelerated']['prompt']['tokens']}"]
        _print_columns(console, _PROMPTS, tokens, plans, _prompt, "prompts")
    console.print()
    scopes = [result["plan"].get("fusion", {}).get("scope") for result in plans]
    if protocol["prompt"] is None and protocol["mode"] == "score" and "prompt" in scopes:
        line = "Scope prompt: without --prompt nothing is a prompt in mode score, so nothing fuses."
        console.print(line, highlight=False)
    if legend:
        for line in _LEGEND:
            console.print(line.format(_SPEED[protocol["mode"]]), highlight=False, markup=False)


def number(value: float, sign: str = "") -> str:
    """Return a figure with three decimals, without any from a thousand on, as a power of ten from a million on."""
    size = abs(value)
    return f"{value:{sign}.1e}" if size >= 1e6 else f"{value:{sign}.{0 if size >= 1e3 else 3}f}"


def _print_columns(
    console: Console,
    names: tuple[str, ...],
    dense: list[str],
    plans: Sequence[dict[str, Any]],
    row: Callable[[dict[str, Any]], list[str]],
    first: str = "plan",
) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold", vertical="bottom")
    for name in names:
        table.add_column(escape(name), justify="right", no_wrap=True, vertical="bottom")
    table.add_row("dense", *dense)
    for result in plans:
        table.add_row(escape(result["plan"]["name"]), *row(result))
    console.print()
    console.print(table)


def _reads_less(plan: dict[str, Any]) -> bool:
    """Whether a plan does what the last columns are about: to attention, to sublayers, to the cache's numbers."""
    return plan.get("kv", {}).keys() > {"fill"} or "shortcuts" in plan.get("halting", {})


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
        f"dense: {result['dense']['nll']:.4f} nats per token, {result['dense']['bits_per_byte']:.3f} bits per byte",
    ]


def _baseline(results: Sequence[dict[str, Any]]) -> str:
    """Say which weights the dense row has read, and which the plans that choose bits."""
    settings = [result["settings"] for result in results]
    quantizing = next((each["nesting"] for each in settings if each["nesting"] is not None), None)
    how = "" if quantizing is None else f"{quantizing['method']}, groups of {quantizing['group_size']}"
    if settings[0]["baseline"] == "nested":
        return _QUANTIZED_BASELINE.format(how)
    line = _PLAIN_BASELINE.format(results[0]["model"]["dtype"])
    return line if quantizing is None else f"{line}; plans that choose bits read them quantized in memory ({how})"


def _dense_loss(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    flops = (_scaled(dense[f"{key}_per_token"]).rstrip() for key in ("flops", "flops_body"))
    return [number(dense["ppl"]), "", "", *flops]


def _loss(result: dict[str, Any]) -> list[str]:
    side, delta = result["accelerated"], result["delta"]
    return [
        number(side["ppl"]),
        f"{number(delta['ppl'], '+')} {_interval(delta['ppl_ci95'])}",
        f"{delta['nll']:+.4f}",
        *(_saved(delta[f"{key}_reduction"]) for key in ("flops", "flops_body")),
    ]


def _dense_cost(result: dict[str, Any]) -> list[str]:
    dense = result["dense"]
    return [
        "",
        "",
        _scaled(dense["bitops_per_token"]).rstrip(),
        f"{_scaled(dense['weight_bytes_per_token'])}B",
        f"{_scaled(dense['kv_bytes'])}B",
        f"{dense['tokens_per_second']:.0f} tok/s",
    ]


def _cost(result: dict[str, Any]) -> list[str]:
    delta = result["delta"]
    saved = (_saved(delta[f"{key}_reduction"]) for key in ("bitops", "weight_bytes", "kv_bytes"))
    return [f"{delta['kl']:.4f}", f"{delta['top1_agreement']:.1%}", *saved, f"{delta['speedup']:.2f}"]


def _dense_ran(result: dict[str, Any]) -> list[str]:
    return [f"{result['model']['layers']}", "", f"{result['model']['weight_bits']}"]


def _ran(result: dict[str, Any]) -> list[str]:
    side = result["accelerated"]
    return [
        f"{side['mean_depth']:.2f}",
        f"{side['fused_fraction']:.1%}",
        f"{side['mean_bits']:.2f}".removesuffix(".00"),
    ]


def _parts(result: dict[str, Any]) -> list[str]:
    """Return what attention did and read, how many sublayers tokens skipped, and bits of the cache's numbers."""
    side = result["accelerated"]
    past = [share for shares in side["shortcuts_by_layer"].values() for share in shares]
    shares = (side["query_components_read"], side["values_read"], sum(past) / len(past))
    return [*(f"{share:.1%}" for share in shares), _entry_bits(result, result["plan"])]


def _entry_bits(result: dict[str, Any], plan: dict[str, Any]) -> str:
    own = "".join(filter(str.isdigit, result["model"]["dtype"]))
    return str(plan.get("kv", {}).get("bits", own))


def _prompt(result: dict[str, Any]) -> list[str]:
    """Return what the prompts took, of which the other tables show nothing but how much of everything fused."""
    prompt = result["accelerated"]["prompt"]
    fused, saved = f"{prompt['fused_fraction']:.1%}", _saved(prompt["flops_reduction"])
    return [f"{prompt['tokens']}", fused, saved, f"{prompt['speedup']:.2f}"]


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
