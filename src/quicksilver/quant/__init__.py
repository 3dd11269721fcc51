"""Nested weights: 8-bit codes whose leading bits are the narrower versions, and linear maps that read them."""

from quicksilver.quant.linear import NestedEmbedding, NestedLinear, NestedSplit, NestedWeight

__all__ = ["NestedEmbedding", "NestedLinear", "NestedSplit", "NestedWeight"]
