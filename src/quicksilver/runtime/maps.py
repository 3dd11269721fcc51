"""Output maps: what a token that stops early predicts from.

How maps are fitted is not known here. A stopped token's keys and values are projected from its own state.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quicksilver.core.trace import Trace
from quicksilver.families.spec import ModelSpec
from quicksilver.plan import Plan
from quicksilver.runtime.status import Stop


class OutputMaps:
    """A plan's fitted output maps, on the model's device and in its dtype.

    Args:
        plan: whose maps these are; none where it uses none.
        spec: the model's facts.

    Raises:
        PlanError: a map is missing or of another model's shape.
    """

    def __init__(self, plan: Plan, spec: ModelSpec) -> None:
        fitted = plan.fitted_maps(spec.num_layers, spec.hidden_size)
        names = {i: f"output.{i}" for i in range(spec.num_layers - 1)}
        self._maps = {i: fitted[name].to(spec.device, spec.dtype) for i, name in names.items() if name in fitted}

    def map_stopped(self, hidden: Tensor, stops: Sequence[Stop], trace: Trace) -> Tensor:
        """Map the states of tokens that stopped, in place.

        Every one is mapped, a prompt's too: callers may read what they predict.

        Args:
            hidden: [N, d] states of a pass's tokens, each with which it stopped or left the last layer.
            stops: who stopped after which layer.
            trace: counts the maps applied.

        Returns:
            `hidden`.
        """
        for stop in stops:
            if stop.layer_idx in self._maps:
                layer_map, rows = self._maps[stop.layer_idx], hidden.index_select(0, stop.origins)
                trace.at(stop.layer_idx).record_fitted(len(rows), layer_map.macs, layer_map.nbytes)
                hidden.index_copy_(0, stop.origins, rows + layer_map(rows))
        return hidden
