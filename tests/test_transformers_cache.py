"""The KV cache of the transformers engine's decode loop, against the cache of transformers itself."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from engines.local.transformers_cache import RoomyLayer, make_room

STEPS = 150  # more than the room of a layer, twice


def states(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 4)


def test_a_layer_with_room_holds_what_a_layer_of_transformers_holds() -> None:
    torch.manual_seed(0)
    theirs, ours = DynamicCache(), DynamicCache()
    given = states(5, 7), states(5, 7)
    for cache in (theirs, ours):
        cache.update(*given, 0)
    make_room(ours)
    kept = {20: [0, 4, 2, 3], 70: [0, 1, 3], 71: [2, 1], 140: [1]}
    rows = 5
    for step in range(STEPS):
        given = states(rows, 1), states(rows, 1)
        expected, found = theirs.update(*given, 0), ours.update(*given, 0)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length() == 8 + step
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        if step in kept:
            rows = len(kept[step])
            for cache in (theirs, ours):
                cache.reorder_cache(torch.tensor(kept[step]))


def test_a_step_copies_no_earlier_token() -> None:
    cache = DynamicCache()
    cache.update(states(2, 3), states(2, 3), 0)
    make_room(cache)
    first = cache.update(states(2, 1), states(2, 1), 0)[0]
    cache.reorder_cache(torch.tensor([0]))
    assert cache.update(states(1, 1), states(1, 1), 0)[0].data_ptr() == first.data_ptr()


def test_a_sliding_window_stays_what_it_is() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(4)]
    cache.update(states(2, 3), states(2, 3), 0)
    make_room(cache)
    assert not isinstance(cache.layers[0], RoomyLayer)
