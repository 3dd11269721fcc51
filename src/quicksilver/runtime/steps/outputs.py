"""Output maps: what a token that stopped early predicts from."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from quicksilver.backends.state import Stop
from quicksilver.core.trace import Trace
from quicksilver.plan.affine import AffineMap


def map_stopped(maps: Mapping[int, AffineMap], hidden: Tensor, stops: Sequence[Stop], trace: Trace) -> Tensor:
    """Map the states [N, d] of tokens that stopped, in place, by the map of the layer after which they did.

    Every one is mapped, a prompt's too: callers may read what they predict.
    """
    for layer_idx, origins in stops:
        if layer_idx in maps:
            layer_map, rows = maps[layer_idx], hidden.index_select(0, origins)
            trace.record_fitted(layer_idx, len(rows), layer_map.macs, layer_map.nbytes)
            hidden.index_copy_(0, origins, rows + layer_map(rows))
    return hidden
