"""Plans that choose bits, made ready for a model: its weights quantized, their thresholds fitted."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quicksilver.cli.common import calibration_windows, own_lines, progress, read_texts, warn_fitted_elsewhere
from quicksilver.errors import InputError

CALIBRATION_HELP = "UTF-8 text that thresholds of bits are fitted to (default: text sampled from the model)."
_CALIBRATION_TOKENS = 4096
_WINDOW = 512


def read_calibration(path: str | None, plans: Sequence[Any]) -> Any:
    """Return the text that recipes are fitted to, None where none was given; refuse one where no plan is a recipe."""
    if path is None:
        return None
    if not any(plan.is_recipe for plan in plans):
        raise InputError(f"--calibration {path} is of no use: no --plan is a recipe, such as channel-5bit")
    return read_texts(path)[0]


def ready(model: Any, name: str, plans: Sequence[Any], tokenizer: Any, corpus: Any) -> tuple[Any, list[Any]]:
    """Return a quantized model, None where no plan needs one, and the plans, fitted where they lack thresholds."""
    spec, recipes = model.adapter.spec, [plan for plan in plans if plan.is_recipe]
    for plan in plans:  # what does not fit is found before the slow part
        replace(plan, precision=None).check_model(spec.num_layers, 0, spec.hidden_size)
    windows, source, tokens = _windows(model, tokenizer, corpus) if recipes else ([], "", 0)
    quantized = None if all(plan.precision is None for plan in plans) else quantized_copy(model)
    for plan in plans:  # an error about a plan stands alone, without the warning that explains it
        if quantized is not None and not plan.is_recipe:
            plan.check_model(spec.num_layers, len(quantized.adapter.layers[0].quantized), spec.hidden_size)
    for plan in plans:
        warn_fitted_elsewhere(plan, model if quantized is None or plan.precision is None else quantized)
    if quantized is None or not recipes:
        return quantized, list(plans)
    fitted = _fit(quantized, name, plans, windows, source, tokens)
    print(f"thresholds of {', '.join(plan.name for plan in recipes)}: fitted to {tokens} tokens {source}")
    return quantized, fitted


def _fit(quantized: Any, name: str, plans: Sequence[Any], windows: list[Any], source: str, tokens: int) -> list[Any]:
    from quicksilver.calibrate.bits import fit
    from quicksilver.families.fingerprint import fingerprint
    from quicksilver.plan.plan import FittedTo

    record = FittedTo(name, fingerprint(quantized.model, quantized.adapter.spec), source.removeprefix("of "), tokens)
    with progress("fitting bits", len(windows) * sum(plan.is_recipe for plan in plans)) as advance:
        return [
            replace(fit(quantized.adapter, plan, windows, advance, quantized.special_ids), fitted_to=record)
            if plan.is_recipe
            else plan
            for plan in plans
        ]


def quantized_copy(model: Any) -> Any:
    """Return a copy of a model, quantized in memory, or the model itself where it is quantized already."""
    if model.adapter.spec.is_quantized:
        return model
    import copy

    from quicksilver.families.quantize import quantize_model, quantized_names
    from quicksilver.loading.load import accelerate
    from quicksilver.weights.config import LAYERS_ONLY

    config, plain = LAYERS_ONLY, copy.deepcopy(model.model)
    with progress("quantizing weights", len(quantized_names(plain, config))) as advance:
        quantize_model(plain, config, on_map=advance)
    print(
        f"weights quantized in memory ({config.method}, groups of {config.group_size}) for plans that choose bits;\n"
        "`quicksilver quantize` with --calibration does better"
    )
    with own_lines():
        return accelerate(plain, "dense", model.special_ids, model.kernels)


def _windows(model: Any, tokenizer: Any, corpus: Any) -> tuple[list[Any], str, int]:
    """Return windows of calibration text [T], where they are from, and how many tokens of text they hold."""
    import torch

    if corpus is None:
        from quicksilver.calibrate.samples import sample_windows

        sampled = sample_windows(model, _CALIBRATION_TOKENS)
        return sampled, "sampled from the model (seed 0)", sum(map(len, sampled))
    limit = model.adapter.spec.max_positions
    windows, tokens = calibration_windows(corpus, tokenizer, limit, _WINDOW, _CALIBRATION_TOKENS)
    return [torch.tensor(window) for window in windows], f"of {corpus.name}", tokens
