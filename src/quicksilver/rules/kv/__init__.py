"""Keys and values: what halted tokens leave, and what of the cache is not kept or not read."""
