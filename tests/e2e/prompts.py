"""Prompts, a halting plan and a tolerance that the tests of the Python interface share."""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver.rules import ForcedRule
from tests import tiny
from tests.engines import halting_plan
from tests.tolerances import LOGITS

ATOL = LOGITS[torch.float32]
PROMPT = tiny.token_ids(9, seed=3)[None]
HALTING = halting_plan(ForcedRule((1, 3, 2, 4)))


def left_padded(lengths: tuple[int, ...] = (9, 5, 1), columns: int = 0) -> dict[str, Tensor]:
    """Return prompts of unequal length, padded on the left with id 0 to `columns` or the longest."""
    columns = max(columns, *lengths)
    input_ids = torch.zeros(len(lengths), columns, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, columns - length :] = tiny.token_ids(length, seed=row)
        mask[row, columns - length :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
