"""In how many bits weights are read and cache entries are kept."""

MAX_BITS = 8
"""Bits of an any-precision weight, all of them read."""

WEIGHT_BITS = (2, 4, 6, 8)
"""Bits of an any-precision weight that can be read, besides none."""

ENTRY_BITS = 8
"""Of keys and values kept as whole numbers with a scale."""

HALF_BITS = 16
"""Of keys and values kept as bfloat16."""
