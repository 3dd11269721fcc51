"""Plans that choose widths, made ready for a model: its weights nested, their thresholds fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quicksilver.cli.common import calibration_windows, progress

CALIBRATION_HELP = "UTF-8 text that width thresholds are fitted to (default: text sampled from the model)."
_CALIBRATION_TOKENS = 4096
_WINDOW = 512


def ready(model: Any, plans: Sequence[Any], tokenizer: Any, calibration: str | None) -> tuple[Any, list[Any]]:
    """Return a model with nested weights, or None where no plan needs one, and the plans with thresholds.

    Args:
        model: a `QuickSilverForCausalLM`.
        plans: any plans.
        tokenizer: of the model.
        calibration: path of a text, or None to sample from the model.
    """
    if all(plan.precision is None for plan in plans):
        return None, list(plans)
    nested = nested_copy(model)
    if not any(plan.is_recipe for plan in plans):
        return nested, list(plans)
    from quicksilver.calibrate.widths import fit

    windows, source = _windows(model, tokenizer, calibration)
    recipes = [plan for plan in plans if plan.is_recipe]
    with progress("fitting widths", len(windows) * len(recipes)) as advance:
        fitted = [fit(nested.adapter, plan, windows, advance, nested.special_ids) for plan in plans]
    names = ", ".join(plan.name for plan in recipes)
    print(f"thresholds of {names}: fitted to {sum(map(len, windows))} tokens {source}")
    return nested, fitted


def nested_copy(model: Any) -> Any:
    """Return a copy of a model with weights nested in memory, or the model itself where they are nested already."""
    if model.adapter.spec.is_nested:
        return model
    import copy

    from quicksilver.models.nesting import nest
    from quicksilver.quant.config import QuantizationConfig
    from quicksilver.runtime.loading import accelerate

    config, plain = QuantizationConfig(), copy.deepcopy(model.model)
    nest(plain, config)
    print(
        f"weights nested in memory (method {config.method}, groups of {config.group_size}) for plans that choose"
        " widths; dense is the model as loaded. `quicksilver quantize` with --calibration does better."
    )
    return accelerate(plain, "dense", model.special_ids)


def _windows(model: Any, tokenizer: Any, calibration: str | None) -> tuple[list[Any], str]:
    import torch

    if calibration is None:
        from quicksilver.calibrate.samples import sample_windows

        return sample_windows(model, _CALIBRATION_TOKENS), "sampled from the model (seed 0)"
    from quicksilver.measure.texts import read_text

    limit = model.adapter.spec.max_positions
    windows = calibration_windows(read_text(calibration), tokenizer, limit, _WINDOW, _CALIBRATION_TOKENS)
    return [torch.tensor(window.token_ids) for window in windows], f"of {calibration}"
