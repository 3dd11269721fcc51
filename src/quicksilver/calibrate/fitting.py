"""Everything that the search needs to know of a model, in a fixed number of passes over the part to fit on."""

from collections.abc import Sequence

from torch import Tensor

from quicksilver.calibrate import outputs, sensitivity, shortcuts
from quicksilver.calibrate.bits import Text, collect_means, collect_scores, unprotected
from quicksilver.calibrate.candidates import CalibrationData, shortcuts_at
from quicksilver.calibrate.histograms import quantiles
from quicksilver.calibrate.mechanisms import Mechanism
from quicksilver.calibrate.objectives import UnitCosts
from quicksilver.calibrate.observe import Advance
from quicksilver.families.spec import Adapter
from quicksilver.plan import Plan
from quicksilver.plan.tensors import PlanTensors
from quicksilver.rules import ChannelBitsRule, HaltingConfig, KVConfig, PrecisionConfig, Shortcut
from quicksilver.rules.precision.base import mean_name

_TRIED = 0.25  # share of channels left out to learn whether they should be centred
_PROBED = 4  # windows, of the fitted part, that sensitivities are measured on
_FIRST_EXIT = 0.5  # of the depth: no token halts before
_REFIT_PRICE = 0.2  # at which shortcuts are chosen for the second fit


def steps(adapter: Adapter, mechanisms: Sequence[Mechanism], num_windows: int) -> int:
    """Return how many steps `fit` reports, but for shortcuts' second fit, which depends on the first."""
    spec, total = adapter.spec, 0
    if "halting" in mechanisms:
        total += 2 * num_windows
    if "shortcuts" in mechanisms:
        total += 2 * num_windows + 2 * spec.num_layers
    if "skipping" in mechanisms:
        total += len(sensitivity.THRESHOLDS) + spec.num_layers
    if "entries" in mechanisms:
        total += 1
    if "channels" in mechanisms:
        total += 3 * num_windows + sum(len(layer.quantized) for layer in adapter.layers)
    return total


def fit(
    adapter: Adapter,
    mechanisms: Sequence[Mechanism],
    units: UnitCosts,
    windows: Sequence[Tensor],
    bits: tuple[int, ...],
    special_ids: Sequence[int] = (),
    on_step: Advance = lambda: None,
) -> CalibrationData:
    """Fit maps and gates on windows of token ids [T], and measure what each unit of work is worth."""
    spec = adapter.spec
    data = CalibrationData(spec, units, max(map(len, windows)))
    probe = sensitivity.Probe(adapter, windows[:: max(len(windows) // _PROBED, 1)][:_PROBED])
    if "halting" in mechanisms and spec.num_layers > 1:
        first = min(max(int(spec.num_layers * _FIRST_EXIT), 1), spec.num_layers - 1) - 1
        data.halt_layers = tuple(range(max(first, 0), spec.num_layers - 1))
        data.tensors |= outputs.fit_maps(adapter, data.halt_layers, windows, on_step)
        data.tensors |= outputs.fit_gates(adapter, data.tensors, data.halt_layers, windows, on_step)
    if "skipping" in mechanisms:
        data.attention = sensitivity.attention_prices(probe, on_step)
    if "entries" in mechanisms:
        data.entry_nats = probe.nats(Plan("entries", kv=KVConfig(bits=8)))
        on_step()
    if "channels" in mechanisms:
        text = unprotected(adapter, PrecisionConfig(ChannelBitsRule(target=8.0)), windows, special_ids)
        _fit_channels(data, adapter, probe, text, bits, on_step)
    if "shortcuts" in mechanisms:
        _fit_shortcuts(data, adapter, probe, windows, on_step)
    return data


def _fit_channels(
    data: CalibrationData,
    adapter: Adapter,
    probe: sensitivity.Probe,
    text: Sequence[Text],
    bits: tuple[int, ...],
    on_step: Advance,
) -> None:
    """Learn what channels contribute, plain or less their mean, whichever lets more of them be left out."""
    means = collect_means(adapter, text, on_step)
    tensors = {mean_name(*divmod(i, len(adapter.layers[0].quantized))): mean for i, mean in enumerate(means)}
    found = []
    for centred in (False, True):
        rule = ChannelBitsRule(target=8.0, bits=bits, centred=centred)
        scores = collect_scores(rule, adapter, text, on_step, means if centred else None)
        limits = tuple(quantiles(each.counts, (1.0 - _TRIED, _TRIED)) for each in scores)
        config = PrecisionConfig(ChannelBitsRule(limits, (8, 0), centred=centred))
        nats = probe.nats(Plan("channels", precision=config, tensors=PlanTensors(tensors) if centred else None))
        found.append((nats, centred, scores))
    _, data.centred, data.map_scores = min(found, key=lambda each: each[0])
    if data.centred:
        data.tensors |= tensors
    data.map_weights = sensitivity.map_weights(probe, data.map_scores, means if data.centred else None, on_step)


def _fit_shortcuts(
    data: CalibrationData, adapter: Adapter, probe: sensitivity.Probe, windows: Sequence[Tensor], on_step: Advance
) -> None:
    """Fit all shortcuts apart and learn what their errors cost; then those worth taking again, one after another."""
    chosen = shortcuts.units(adapter)
    tensors, errors = shortcuts.fit_units(adapter, chosen, windows, Plan.dense(), on_step)
    for unit in chosen:
        shortcut = Shortcut(*unit)
        own = PlanTensors({key: t for key, t in tensors.items() if key.startswith(f"{shortcut.name}.")})
        nats = probe.nats(Plan("one", HaltingConfig(shortcuts=(shortcut,)), tensors=own))
        data.shortcuts[unit] = (nats / max(errors[unit], 1e-30), nats)
        on_step()
    data.tensors |= tensors
    data.tensors |= shortcuts.fit_in_order(adapter, shortcuts_at(_REFIT_PRICE, data), windows)
