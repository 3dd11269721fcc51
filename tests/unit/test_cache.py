"""One sequence's cache: growth without copying per token, cuts, copies; and batches of them."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

import quicksilver
from quicksilver.cache import CacheShape, ModelIdentity, OpenGroup, RaggedKVCache, SequenceCache, append_rows, extend
from quicksilver.core.ragged import RaggedLayout
from quicksilver.errors import InputError
from tests import tiny, tolerances

CPU = torch.device("cpu")
SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=3, dtype=torch.float32, device=CPU)
OWNER = ModelIdentity()
ROW = 2 * 2 * 3 * 4 + 4  # bytes of a key, a value and a position


def marked(marks: torch.Tensor) -> torch.Tensor:
    """Keys that say where they belong."""
    return marks.float()[:, None, None].expand(-1, 2, 3).contiguous()


def fed(cache: SequenceCache, count: int, joinable: bool = False) -> SequenceCache:
    """Write tokens to all layers."""
    positions = torch.arange(cache.length, cache.length + count)
    for layer_idx in range(SHAPE.num_layers):
        cache.append(layer_idx, positions, marked(positions), marked(positions))
    cache.advance(count, joinable)
    return cache


def assert_sums(cache: SequenceCache) -> None:
    """What is counted on the way is what the tensors say."""
    layers = [cache.entries(layer_idx) for layer_idx in range(SHAPE.num_layers)]
    assert cache.num_entries == sum(len(layer.positions) for layer in layers)
    assert cache.used_nbytes == sum(t.nbytes for layer in layers for t in layer if t is not None)
    held = [getattr(layer, name) for layer in cache._layers for name in layer.TENSORS]
    assert cache.nbytes == sum(t.nbytes for t in held if t is not None)


def test_a_first_append_allocates_exactly_and_a_prefill_leaves_no_room() -> None:
    cache = fed(SequenceCache(SHAPE, OWNER), 7)
    assert cache.nbytes == cache.used_nbytes == 2 * 7 * ROW
    assert fed(fed(cache, 1), 40).nbytes == 2 * 48 * ROW
    assert_sums(cache)


def test_growth_copies_rarely_and_keeps_everything() -> None:
    cache, allocations = SequenceCache(SHAPE, OWNER), set()
    for position in range(5000):
        at = torch.tensor([position])
        cache.append(0, at, marked(at), marked(at))
        allocations.add(cache.nbytes)
    assert torch.equal(cache.entries(0).keys[:, 0, 0], torch.arange(5000.0))
    assert len(allocations) < 40
    assert cache.nbytes <= (1.26 * 5000 + 33) * ROW
    assert_sums(cache)


def test_sequences_and_layers_have_lengths_of_their_own() -> None:
    cache = RaggedKVCache([SequenceCache(SHAPE, OWNER) for _ in range(3)])
    layout = RaggedLayout.build([0, 0, 0], [2, 0, 3], CPU)
    some = layout.select(torch.tensor([1, 2, 4]))
    for layer_idx, rows in enumerate((layout, some)):
        keys = marked(rows.seq_ids * 100 + rows.positions)
        append_rows(cache.sequences, layer_idx, rows, keys, keys)
    for sequence, length in zip(cache.sequences, layout.lengths, strict=True):
        sequence.advance(length)
        assert_sums(sequence)
    assert cache.entry_counts(0) == [2, 0, 3]
    assert cache.entry_counts(1) == [1, 0, 2]
    assert cache.entries(1, 2).positions.tolist() == [0, 2]
    assert cache.entries(1, 2).keys[:, 0, 0].tolist() == [200.0, 202.0]
    assert cache.seq_lengths == [2, 0, 3]
    assert cache.get_seq_length() == 3
    assert cache.num_entries == 8


def test_masses_begin_with_the_first_group() -> None:
    cache = fed(SequenceCache(SHAPE, OWNER), 3)
    at, ones = torch.tensor([5]), torch.ones(1, 2, 3)
    cache.append(1, at, ones, ones, torch.tensor([2]))
    cache.append(1, at + 1, ones, ones)
    assert cache.entries(0).masses is None
    assert cache.entries(1).masses.tolist() == [1, 1, 1, 2, 1]  # type: ignore[union-attr]
    cache.retract(0, 6)
    assert cache.entries(1).masses.tolist() == [1, 1, 1, 2]  # type: ignore[union-attr]
    cache.retract(0, 6)  # no entry is there
    assert cache.num_entries_in(1) == 4
    assert_sums(cache)


def test_kernels_get_places_for_each_layer_and_sequence() -> None:
    caches = [fed(SequenceCache(SHAPE, OWNER), 3), SequenceCache(SHAPE, OWNER)]
    places = extend(caches, range(2), [1, 2])
    assert places[6::7] == [3, 0, 3, 0]
    assert [cache.num_entries_in(1) for cache in caches] == [4, 2]
    assert places[0] == caches[0].entries(0).keys.data_ptr()
    assert places[-3] == caches[1].entries(1).positions.data_ptr()
    assert [*places[2:4], places[5]] == [0, 0, 0]


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_what_is_written_to_a_copy_or_its_original_does_not_change_the_other(bits: int | None) -> None:
    shape = CacheShape(2, 2, 3, torch.float32, CPU, bits)
    for make, written in product((SequenceCache.copy, copy.copy, copy.deepcopy), (0, 1)):
        first = fed(SequenceCache(shape, OWNER), 5, joinable=True)
        first.join([2])
        pair = first, make(first)
        other, cache = pair[written], pair[1 - written]
        expected = [t.clone() for layer_idx in range(2) for t in cache.entries(layer_idx)[:3]]
        fed(other, 1).join([1, 3])
        other.truncate(0)
        fed(other, 9).drop()
        held = [t for layer_idx in range(2) for t in cache.entries(layer_idx)[:3]]
        assert all(torch.equal(before, after) for before, after in zip(expected, held, strict=True))
        assert (cache.length, cache.kept(3), cache.num_entries) == (5, 1, 10)


def test_cuts_keep_what_is_before_a_group() -> None:
    cache = fed(SequenceCache(SHAPE, OWNER), 4, joinable=True)
    cache.join([2, 3])
    fed(cache, 2)  # tokens that cannot fuse
    assert [cache.kept(length) for length in range(7)] == [0, 0, 1, 1, 1, 5, 6]
    cache.open_group = OpenGroup(0, 3, 7, 3, torch.zeros(1, 2), None)
    assert cache.kept(4) == 4
    assert cache.truncate(4) == 4
    assert cache.open_group is not None
    assert cache.truncate(3) == 1
    assert cache.open_group is None
    assert cache.entries(0).positions.tolist() == [0]
    assert fed(cache, 6).kept(3) == 3  # what was known of tokens taken back is forgotten
    for length in (-1, 8):
        with pytest.raises(InputError, match=f"7 tokens cannot be cut to {length}"):
            cache.truncate(length)


def test_groups_that_no_later_pass_goes_on_with_are_cut_behind() -> None:
    cache = fed(SequenceCache(SHAPE, OWNER), 6)
    cache.join([2, 3])
    assert [cache.kept(length) for length in range(7)] == [0, 1, 1, 1, 4, 5, 6]


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    model = quicksilver.accelerate(tiny.model("llama"))
    ids = tiny.token_ids(12)[None]
    with torch.inference_mode():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        cache = model(ids[:, 5:6], past_key_values=cache).past_key_values
    logits = model(ids[:, 6:], past_key_values=cache).logits
    assert torch.allclose(logits, model(ids).logits[:, 6:], atol=tolerances.LOGITS[torch.float32])
