"""Second moments of the inputs of a model's linear maps on calibration text."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quicksilver.calibrate.observe import Advance, observing
from quicksilver.errors import InputError, ModelError
from quicksilver.families.family import family_of
from quicksilver.families.quantize import HEAD, input_groups


@torch.no_grad()
def collect_hessians(
    model: Any, windows: Iterable[Sequence[int]], head: bool = False, on_window: Advance = lambda: None
) -> dict[str, Tensor]:
    """Run windows of token ids through a model; return `X^T X` of each linear map's inputs, [in, in] float32, by path.

    Maps that read the same input share one tensor; those of all layers are kept at once, `4 * in ** 2` bytes each:
    0.7 GB for a layer of a Llama with 7 billion parameters, 22 GB for the whole. `head`: the head's inputs too.

    Raises:
        InputError: a token id outside of the vocabulary.
        ModelError: a map's inputs are NaN or infinite.
        UnsupportedModelError: the family is not supported.
    """
    sums: dict[str, Tensor] = {}
    body, names = model.get_submodule(family_of(model.config).body), [name for name, *_ in input_groups(model)]

    def observe(i: int, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        _add(sums, names[i], args[0])

    with observing([model.get_submodule(name) for name in names], observe):
        for window in windows:
            ids = torch.tensor(window, device=model.device)
            outside = ids[(ids < 0) | (ids >= model.config.vocab_size)]
            if len(outside):
                raise InputError(f"token id {int(outside[0])} is outside the vocabulary of {model.config.vocab_size}")
            normed = body(input_ids=ids[None], use_cache=False).last_hidden_state
            if head:
                _add(sums, HEAD, normed)
            on_window()
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ModelError(f"the inputs of {name!r} are NaN or infinite on the calibration text")
    return sums | {name: sums[group[0]] for group in input_groups(model) if group[0] in sums for name in group}


def _add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    rows = x.reshape(-1, x.shape[-1]).float()  # [N, in]
    if name not in sums:
        sums[name] = rows.new_zeros((rows.shape[1], rows.shape[1]))
    sums[name].addmm_(rows.T, rows)
