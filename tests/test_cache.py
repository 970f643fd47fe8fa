"""The generation's state travels with its rows through whatever happens to the cache."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="caches are transformers caches")
from exeunt.cache import ExitCacheLayer, adopt
from oracle import tiny_llama


def filled(lazy, batch=3, length=5):
    cache = transformers.DynamicCache() if lazy else transformers.DynamicCache(config=tiny_llama(layers=2).config)
    for layer in range(2):
        cache.update(torch.randn(batch, 2, length, 8), torch.randn(batch, 2, length, 8), layer)
    return cache


@pytest.mark.parametrize("lazy", [True, False])
def test_adopting_keeps_keys_values_and_class(lazy):
    cache = filled(lazy)
    keys = [layer.keys for layer in cache.layers]
    state = adopt(cache, 2)
    assert state.prompt_length == 5 and adopt(cache, 2) is state
    assert all(type(layer) is ExitCacheLayer for layer in cache.layers) and isinstance(cache, transformers.DynamicCache)
    assert all(a is b.keys for a, b in zip(keys, cache.layers, strict=True))
    cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("lazy", [True, False])
def test_adopting_an_empty_cache(lazy):
    cache = transformers.DynamicCache() if lazy else transformers.DynamicCache(config=tiny_llama(layers=2).config)
    state = adopt(cache, 2)
    assert state.prompt_length == 0 and cache.get_seq_length() == 0
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), layer)
    assert len(cache.layers) == 2 and type(cache.layers[1]) is ExitCacheLayer and adopt(cache, 2) is state


def test_two_caches_have_two_states():
    assert adopt(filled(True), 2) is not adopt(filled(True), 2)


def test_rows_travel_with_the_cache():
    cache = filled(True)
    state = adopt(cache, 2)
    state.stop_ids = torch.tensor([7, 8])
    state.feed(torch.tensor([[7], [1], [1]]))
    state.feed(torch.tensor([[0], [1], [8]]))  # sticky: row 0 has ended before
    assert state.finished.tolist() == [True, False, True]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert state.finished.tolist() == [False, False, True]
    cache.batch_repeat_interleave(2)
    assert state.finished.tolist() == [False] * 4 + [True] * 2
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert state.finished.tolist() == [True, False] and cache.layers[1].keys.shape[0] == 2
    cache.reset()
    assert state.finished is None and state.prompt_length == 0


def test_nothing_is_known_of_rows_without_ids_or_stop_ids():
    state = adopt(filled(True), 2)
    state.feed(torch.tensor([[7], [1], [1]]))
    assert state.finished is None
    state.stop_ids = torch.tensor([7])
    state.feed(None)
    assert state.finished is None


def test_positions_count_new_tokens():
    state = adopt(filled(True), 2)
    assert state.position(5) == (1, None)
    state.max_length = 25
    assert state.position(8) == (4, 20)
    state.begin_prompt(9)
    assert state.position(9) == (1, 16)


def test_other_caches_are_left_alone():
    model = tiny_llama(layers=2)
    static = transformers.StaticCache(config=model.config, max_cache_len=8)
    assert adopt(static, 2) is None and adopt(None, 2) is None
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=4)
    sliding = transformers.DynamicCache(config=config)
    assert adopt(sliding, 2) is None and not isinstance(sliding.layers[0], ExitCacheLayer)
