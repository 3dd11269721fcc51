"""Shortcuts: affine maps that stand in for sublayers, and gates that say for which tokens they are good enough."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quicksilver.calibrate.observe import PROTECTED, Advance, SublayerRows, watch_sublayers
from quicksilver.calibrate.ridge import RidgeSums, named_tensors
from quicksilver.core.signals import log_norm
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import HaltingConfig, Part, Shortcut

Unit = tuple[int, Part]
_LEAST_ERROR = 1e-8  # keeps logarithms finite


def units(adapter: Adapter) -> list[Unit]:
    return [(i, part) for i in range(adapter.spec.num_layers) for part in ("attention", "mlp")]


def fit_units(
    adapter: Adapter, chosen: Sequence[Unit], windows: Sequence[Tensor], plan: Plan, on_window: Advance = lambda: None
) -> tuple[dict[str, Tensor], dict[Unit, float]]:
    """Fit maps and gates of sublayers in two passes, with their inputs as the plan's own shortcuts leave them.

    Returns:
        Tensors `shortcut.LAYER.PART.*` of a plan, and for each sublayer the mean squared error of its map as a share
        of the squared norm of the state.
    """
    d, device = adapter.spec.hidden_size, adapter.spec.device
    sums = {unit: RidgeSums(d, d, device) for unit in chosen}
    gates = {unit: RidgeSums(d + 1, 1, device) for unit in chosen}
    errors = dict.fromkeys(chosen, 0.0)

    def see_map(unit: Unit, rows: SublayerRows) -> None:
        sums[unit].add(rows.normed[PROTECTED:], rows.output[PROTECTED:])

    for window in windows:
        watch_sublayers(adapter, chosen, window, plan, see_map)
        on_window()
    fitted = {unit: sums[unit].solve(_name(unit)) for unit in chosen}

    def see_gate(unit: Unit, rows: SublayerRows) -> None:
        state, normed, output = (part[PROTECTED:].float() for part in rows)
        missed = output - normed @ fitted[unit].weight.float() - fitted[unit].bias.float()
        error = missed.square().sum(-1) / state.square().sum(-1).clamp(min=1e-30)
        errors[unit] += float(error.sum())
        features = torch.cat((normed, log_norm(state)[:, None]), dim=1)  # all that a gate sees but for its constant
        gates[unit].add(features, error.clamp(min=_LEAST_ERROR).log()[:, None])

    for window in windows:
        watch_sublayers(adapter, chosen, window, plan, see_gate)
        on_window()
    tensors = {}
    for unit in chosen:
        gate = gates[unit].solve(_name(unit))
        tensors |= named_tensors(_name(unit), sums[unit].factors(fitted[unit]), fitted[unit].bias)
        tensors[f"{_name(unit)}.gate"] = torch.cat((gate.weight[:, 0], gate.bias))
    return tensors, {unit: errors[unit] / max(sums[unit].num_rows, 1) for unit in chosen}


def fit_in_order(
    adapter: Adapter, chosen: Sequence[Shortcut], windows: Sequence[Tensor], on_window: Advance = lambda: None
) -> dict[str, Tensor]:
    """Return `shortcut.LAYER.PART.*`, fitted one by one: deeper ones on states that shallower ones have changed."""
    tensors: dict[str, Tensor] = {}
    done: list[Shortcut] = []
    for shortcut in sorted(chosen, key=lambda each: (each.layer, each.part)):  # attention runs before the MLP
        config = HaltingConfig(shortcuts=tuple(done)) if done else None
        before = Plan("before", config, tensors=PlanTensors(tensors))
        tensors |= fit_units(adapter, [(shortcut.layer, shortcut.part)], windows, before, on_window)[0]
        done.append(shortcut)
    return tensors


def _name(unit: Unit) -> str:
    return f"shortcut.{unit[0]}.{unit[1]}"
