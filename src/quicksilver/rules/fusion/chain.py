"""Chaining: pairs that are alike become groups, greedily from left to right, none larger than allowed."""

import torch
from torch import Tensor


def chain(alike: Tensor, mass: Tensor, max_group: int) -> Tensor:
    """Return which rows join the group of the row before, [N] bool.

    A row joins where it is like the row before ([N] bool, False at each sequence's first row) and the group so far,
    with it, stands for at most `max_group` tokens by the rows' mass [N]; otherwise it begins a group. The walk from one
    beginning to the next is followed from all rows at once by doubling its stride: O(N log N) without a loop over
    tokens.
    """
    num_rows = alike.shape[0]
    rows = torch.arange(num_rows, device=alike.device)
    before = mass.cumsum(0) - mass  # tokens before each row
    # Where the group that begins at a row must end: where likeness ends, or where it is full.
    run_ends = torch.where(alike, num_rows, rows)  # a row that is unlike the one before ends the run before it
    run_ends = run_ends.flip(0).cummin(0).values.flip(0)  # first unlike row at or after each row
    run_ends = torch.cat((run_ends[1:], run_ends.new_full((1,), num_rows)))  # ... after each row
    full = torch.searchsorted(before + mass, before + max_group, right=True)  # first row that no longer fits
    following = torch.minimum(run_ends, full.clamp(min=rows + 1))
    begins = torch.cat((~alike, alike.new_ones(1)))  # one place past the end absorbs walks that are over
    step = torch.cat((following, following.new_full((1,), num_rows)))
    for _ in range(num_rows.bit_length()):
        begins = begins.index_fill(0, torch.where(begins, step, num_rows), True)
        step = step[step]
    return ~begins[:-1]
