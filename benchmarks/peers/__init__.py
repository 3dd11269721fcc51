"""Our engine beside those that people would run instead, on the same weights, in turn."""
