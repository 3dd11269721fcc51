"""What `quicksilver calibrate` does once its options are checked: text, model, search, files, tables."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quicksilver.calibrate.mechanisms import MECHANISMS
from quicksilver.calibrate.pipeline import Calibration, Calibrator, Settings
from quicksilver.calibrate.report import best_of_groups, frontier, summary
from quicksilver.calibrate.samples import sample_windows
from quicksilver.calibrate.scoring import Budget
from quicksilver.calibrate.splits import SHARES, Split, split_all
from quicksilver.cli.common import progress, window_protocol
from quicksilver.cli.recipes import quantized_copy
from quicksilver.core.files import make_folder, write_atomically
from quicksilver.families.fingerprint import fingerprint as model_fingerprint
from quicksilver.measure import environment
from quicksilver.measure.windows import WindowConfig, WindowedText, cut, default_bos, slide
from quicksilver.plan.plan import FittedTo
from quicksilver.version import __version__

_FIT_TOKENS = 16384
_SAMPLED_CONTEXT = 256  # tokens of a window at most, where the text is the model's own
_HELD_OUT_FACTOR = 1.5  # tokens verified on, for each token searched on
_COLUMNS = (
    "lost\n[{}]",
    "at most\n[95 % CI]",
    "FLOPs\nsaved",
    "in the\nlayers",
    "bitops\nsaved",
    "weights\nsaved",
    "KV\nsaved",
)
_ONE_BASELINE = "saved: of the model as given"
_TWO_BASELINES = (
    "saved: of the model as given; bitops and weights: of it quantized, all 8 bits\n"
    "read, so that plans which choose no bits are far below zero there"
)


def run(
    model: Any,
    tokenizer: Any,
    name: str,
    corpora: Sequence[Any],
    options: dict[str, Any],
    budget: tuple[float, str],
    mechanisms: Sequence[str],
    output: Path,
) -> bool:
    """Calibrate, write the plan and all that belongs to it; return whether a plan held the budget."""
    options["verify_tokens"] = options["verify_tokens"] or int(options["search_tokens"] * _HELD_OUT_FACTOR)
    texts, window_config = _texts(model, tokenizer, corpora, options)
    parts = split_all(texts, _FIT_TOKENS, options["search_tokens"], options["verify_tokens"])
    folder = make_folder("--work", options["work"] or str(output.with_suffix(".work")))
    runner = quantized_copy(model) if "precision" in mechanisms else model
    settings = Settings(
        Budget(*budget),
        options["minimise"],
        tuple(part for each in mechanisms for part in MECHANISMS[each]),
        "kv" in mechanisms,
        options["trials"],
        options["time_limit"],
        options["seed"],
    )
    fingerprint = _fingerprint(runner, window_config, parts)
    result = Calibrator(model, runner, parts, window_config, settings, folder, fingerprint, name, progress).run()
    facts = _facts(name, window_config, parts, model.device)
    if result.verified.chosen is not None:
        tokens = facts["parts"]["fit_tokens"] + facts["parts"]["search_tokens"]
        record = FittedTo(name, model_fingerprint(runner.model, runner.adapter.spec), facts["text"], tokens)
        result = replace(result, plan=replace(result.plan, fitted_to=record))
    _write(result, settings, output, facts)
    _print(result, settings, parts, _ONE_BASELINE if runner is model else _TWO_BASELINES)
    return result.verified.chosen is not None


def _texts(
    model: Any, tokenizer: Any, corpora: Sequence[Any], options: dict[str, Any]
) -> tuple[list[WindowedText], WindowConfig]:
    """Return the windows of the user's texts, or of one sampled from the model."""
    limit, context, prompt = model.adapter.spec.max_positions, options["context"], options["prompt"]
    window_config = window_protocol(limit, default_bos(tokenizer), context, prompt=prompt)
    if corpora:
        return [cut(corpus, tokenizer, window_config) for corpus in corpora], window_config
    window_config = window_protocol(limit, None, min(window_config.context, _SAMPLED_CONTEXT), prompt=prompt)
    return [_sampled(model, tokenizer, window_config, options)], window_config


def _sampled(model: Any, tokenizer: Any, window_config: WindowConfig, options: dict[str, Any]) -> WindowedText:
    seed, tokens = options["seed"], options["search_tokens"]
    wanted = tokens + options["verify_tokens"] + _FIT_TOKENS
    print(f"no text was given: {wanted} tokens are sampled from the model (seed {seed})", file=sys.stderr)
    sequences = [window.tolist() for window in sample_windows(model, wanted, seed)]
    windows = [window for ids in sequences for window in slide(ids[: window_config.context], window_config)]
    size = sum(len(tokenizer.decode(each.token_ids[each.first_scored :]).encode()) for each in windows)
    return WindowedText(f"text sampled from the model (seed {seed})", tuple(windows), size)


def _fingerprint(runner: Any, window_config: WindowConfig, parts: Split) -> str:
    """Return a digest of all that figures depend on but for the settings of the search."""
    spec = runner.adapter.spec
    total = hashlib.sha256(repr((spec, window_config, model_fingerprint(runner.model, spec), __version__)).encode())
    for ids in parts.fit:
        total.update(ids.numpy().tobytes())
    for part in (parts.search, parts.held_out):
        for window in part.text.windows:
            total.update(repr((window.token_ids, window.first_scored, window.prompt)).encode())
    return total.hexdigest()[:16]


def _facts(name: str, window_config: WindowConfig, parts: Split, device: Any) -> dict[str, Any]:
    return {
        "command": "quicksilver " + " ".join(sys.argv[1:]),
        "model": name,
        "text": " and ".join(section for section, _ in parts.search.sections),
        "protocol": {
            "context": window_config.context,
            "stride": window_config.stride,
            "bos": window_config.bos_id is not None,
            "prompt": window_config.prompt,
        },
        "parts": {
            "shares": list(SHARES),
            "fit_tokens": sum(map(len, parts.fit)),
            "search_tokens": parts.search.tokens,
            "held_out_tokens": parts.held_out.tokens,
        },
        "environment": environment.describe(device),
    }


def _write(result: Calibration, settings: Settings, output: Path, facts: dict[str, Any]) -> None:
    from quicksilver.calibrate.picture import draw

    found = frontier(result, settings, facts)
    beside = output.with_suffix(".frontier")
    write_atomically(beside.with_name(f"{beside.name}.json"), json.dumps(found, indent=2) + "\n")
    pictures = draw(beside, found)
    result.plan.save(output)
    print(f"plan: {output}")
    print(f"frontier: {beside}.json, {', '.join(map(str, pictures))}")


def _print(result: Calibration, settings: Settings, parts: Split, baselines: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    print(f"best inside the budget on {parts.search.text.name}; w/o: the chosen plan without one mechanism")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # the longest name leaves 80 columns no more room
    table.add_column("group", no_wrap=True, vertical="bottom")
    unit = "ppl" if settings.budget.unit == "ppl" else "nats"
    for column in _COLUMNS:
        table.add_column(escape(column.format(unit)), justify="right", no_wrap=True)
    rows = {group: each.row for group, each in best_of_groups(result.candidates, settings).items()}
    rows |= {f"w/o {name}": row for name, row in result.leave_one_out.items()}
    if result.verified.row is not None:
        rows["chosen, held out"] = result.verified.row
    for group, row in rows.items():
        table.add_row(group, *_cells(row, settings))
    Console().print(table)
    print(baselines)
    for candidate, row in result.verified.failed:
        delta = summary(row, settings)["delta"]
        print(f"did not hold on held-out text: plan {candidate.row['plan']['hash']}, {delta['nll']:+.4f} nats")
    if result.verified.chosen is None:
        print("no plan held the budget on held-out text; the dense plan was written")


def _cells(row: dict[str, Any], settings: Settings) -> list[str]:
    delta, unit = row["delta"], settings.budget.unit
    saved = [
        delta[f"{name}_reduction{ending}"]
        for name, ending in (
            ("flops", ""), ("flops_body", ""), ("bitops", "_8bit"), ("weight_bytes", "_8bit"), ("kv_used_bytes", ""),
        )
    ]  # fmt: skip
    return [f"{delta[unit]:+.4f}", f"{settings.budget.upper(row):+.4f}", *(f"{share:+.1%}" for share in saved)]
