"""Any-precision weights: codes whose leading bits are the narrower versions, and linear maps that read them."""

from quicksilver.weights.linear import AnyPrecisionEmbedding, AnyPrecisionLinear, AnyPrecisionSplit, AnyPrecisionWeight

__all__ = ["AnyPrecisionEmbedding", "AnyPrecisionLinear", "AnyPrecisionSplit", "AnyPrecisionWeight"]
