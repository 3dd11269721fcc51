"""The cache: a sequence's keys and values in all layers, and batches of sequences as transformers' calls see them."""

from quicksilver.cache.layer import CacheShape, Entries
from quicksilver.cache.ragged import RaggedKVCache
from quicksilver.cache.sequence import ModelIdentity, OpenGroup, SequenceCache, append_rows, extend

__all__ = [
    "CacheShape",
    "Entries",
    "ModelIdentity",
    "OpenGroup",
    "RaggedKVCache",
    "SequenceCache",
    "append_rows",
    "extend",
]
