"""The ragged key/value cache: lengths and positions per layer and sequence."""

from quicksilver.cache.ragged import CacheShape, RaggedKVCache

__all__ = ["CacheShape", "RaggedKVCache"]
