"""The ragged key/value cache: lengths and positions per layer and sequence, and where fusion stands."""

from quicksilver.cache.ragged import CacheShape, RaggedKVCache
from quicksilver.cache.tails import TailRow

__all__ = ["CacheShape", "RaggedKVCache", "TailRow"]
