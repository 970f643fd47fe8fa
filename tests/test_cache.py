"""The generation's state travels with its rows through whatever happens to the cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", reason="caches are transformers caches")
from exeunt.cache import ExitCacheLayer, adopt
from exeunt.models import KeyValues
from exeunt.sliding import SlidingExitCacheLayer
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


@pytest.mark.parametrize("held", [0, 2, 9])
def test_a_sliding_window_shows_what_the_stock_layer_shows(held):
    """Also when it is adopted after tokens have left the window."""
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=4)
    stock, ours = (transformers.DynamicCache(config=config) for _ in range(2))
    g = torch.Generator().manual_seed(0)

    def feed(count, caches):
        new = [torch.randn(2, 3, count, 8, generator=g) for _ in range(2)]
        return [[cache.update(*new, layer) for layer in range(2)] for cache in caches]

    if held:
        feed(held, (stock, ours))
    adopt(ours, 2)
    assert all(type(layer) is SlidingExitCacheLayer for layer in ours.layers) and ours.is_sliding == stock.is_sliding
    for count in (1, 3, 1, 1, 6, 1):
        sizes = [cache.layers[1].get_mask_sizes(query(count)) for cache in (stock, ours)]
        assert sizes[0] == sizes[1] and ours.get_seq_length() == stock.get_seq_length()
        for a, b in zip(*feed(count, (stock, ours)), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    stock.reorder_cache(torch.tensor([1, 1]))
    ours.reorder_cache(torch.tensor([1, 1]))
    for a, b in zip(*feed(1, (stock, ours)), strict=True):
        assert torch.equal(a[0], b[0])


def query(count):
    """A query's length, as this version of transformers tells the masks."""
    return torch.arange(count) if transformers.__version__ < "5" else count


# ---- beside the stock cache: the same calls, the same answers

rows = st.lists(st.integers(0, 7), min_size=1, max_size=6)
calls = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 90)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 6)),
    st.tuples(st.just("reorder"), rows),
    st.tuples(st.just("select"), rows),
    st.tuples(st.just("mask"), rows),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.sampled_from([("reset",), ("deepcopy",), ("pickle",), ("offload",), ("prefetch",), ("assign",), ("inference",)]),
)


def call(cache, what, arg, draw):
    """One thing that a user or generate does to a cache; returns the cache to go on with."""
    batch, length = cache.layers[0].keys.shape[0], cache.get_seq_length()
    if what in ("update", "inference"):
        new = [torch.randn(batch, 2, arg or 1, d, generator=draw) for _ in range(2) for d in (8, 6)]
        with torch.inference_mode(what == "inference"):
            for layer in range(2):
                k, v = cache.update(*new[2 * layer : 2 * layer + 2], layer)
                assert k.shape[2] == v.shape[2] == length + (arg or 1)
    elif what == "crop" and length > arg:
        cache.crop(-arg)
    elif what == "reorder":
        cache.reorder_cache(torch.tensor([(arg * batch)[b] % batch for b in range(batch)]))
    elif what == "select":
        cache.batch_select_indices(torch.tensor([r % batch for r in arg]))
    elif what == "mask":
        cache.batch_select_indices(torch.tensor([b in {r % batch for r in arg} for b in range(batch)]))
    elif what == "repeat" and batch < 5:
        cache.batch_repeat_interleave(arg)
    elif what == "reset" and length:
        with torch.inference_mode(cache.layers[0].keys.is_inference()):  # 4.57 zeroes in place
            cache.reset()
        for layer in range(2):  # 4.57 zeroes, 5 drops: either way, like the stock cache
            cache.update(torch.ones(batch, 2, 1, 8), torch.ones(batch, 2, 1, 6), layer)
    elif what == "deepcopy":
        cache = copy.deepcopy(cache)
    elif what == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    elif what in ("offload", "prefetch"):
        for layer in cache.layers:
            getattr(layer, what)()
    elif what == "assign":
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys * 2, layer.values * 2
    return cache


@given(
    script=st.lists(calls, max_size=12),
    batch=st.integers(1, 3),
    lazy=st.booleans(),
    limit=st.none() | st.integers(1, 99),
)
@settings(deadline=None, max_examples=80)
@example(script=[("inference",), ("reset",)], batch=1, lazy=False, limit=None)
def test_behaves_as_the_stock_cache(script, batch, lazy, limit):
    make = (lambda: transformers.DynamicCache()) if lazy else lambda: transformers.DynamicCache(config=CONFIG)
    stock, ours = make(), make()
    adopt(ours, 2).max_length = limit
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    snapshots = []
    for cache, draw in zip((stock, ours), draws, strict=True):
        for layer in range(2):
            cache.update(
                torch.randn(batch, 2, 3, 8, generator=draw), torch.randn(batch, 2, 3, 6, generator=draw), layer
            )
    for what, *args in script:
        held = [(t, t.clone()) for layer in ours.layers for t in (layer.keys, layer.values)]
        if what != "reset":  # which zeroes in place on 4.57, here as there
            snapshots += held
        stock, ours = (call(c, what, (args or [None])[0], d) for c, d in zip((stock, ours), draws, strict=True))
        assert all(type(layer) is ExitCacheLayer for layer in ours.layers)
        assert ours.get_seq_length() == stock.get_seq_length() == ours.get_seq_length(1)
        assert len(ours) == len(stock) and ours.is_initialized == stock.is_initialized
        for a, b in zip(ours.layers, stock.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            assert a.keys.dtype == b.keys.dtype and a.get_seq_length() == b.get_seq_length()
    if "reset" not in [what for what, *_ in script]:
        assert all(torch.equal(a, b) for a, b in snapshots), "what was handed out does not change"


CONFIG = tiny_llama(layers=2).config


def layer_of(batch=3, length=5):
    cache = filled(False, batch, length)
    adopt(cache, 2)
    return cache.layers[0]


def test_appends_in_place():
    layer = layer_of()
    one = torch.ones(3, 2, 1, 8)
    keys, _ = layer.update(one, one)
    places = {keys.data_ptr()}
    for _ in range(60):
        keys, _ = layer.update(one, one)
        places.add(keys.data_ptr())
    assert len(places) == 1 and keys.shape[2] == 66


def test_room_is_bounded_by_what_the_generation_can_need():
    layer = layer_of()
    layer.state.max_length = 8
    one = torch.ones(3, 2, 1, 8)
    layer.update(one, one)
    assert layer._keys.shape[2] == 8
    layer.state.max_length = 6  # a second generation that says less than the cache holds
    for _ in range(4):
        layer.update(one, one)
    assert layer.keys.shape[2] == 10


def test_rows_that_do_not_append_leave_zeros():
    layer = layer_of()
    layer.update(torch.ones(3, 2, 2, 8), torch.ones(3, 2, 2, 8))
    layer.crop(-2)  # what is cropped leaves nothing behind
    keys, values = layer.append(KeyValues(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), 0), torch.tensor([0, 2]))
    assert keys.shape == (2, 2, 6, 8) and (keys[:, :, 5] == 1).all() and (values[:, :, 5] == 1).all()
    assert (layer.keys[1, :, 5] == 0).all() and (layer.values[1, :, 5] == 0).all()


def test_a_copy_and_its_original_do_not_write_to_each_other():
    layer = layer_of()
    one = torch.ones(3, 2, 1, 8)
    layer.update(one, one)
    twins = [layer, copy.copy(layer), copy.deepcopy(layer)]
    for k, twin in enumerate(twins):
        twin.update(k * one, k * one)
    assert [twin.keys[0, 0, -1, 0].item() for twin in twins] == [0, 1, 2]


def test_gradients_flow_through_the_cache():
    layer = layer_of(length=2)
    k = torch.randn(3, 2, 1, 8, requires_grad=True)
    for _ in range(2):
        keys, values = layer.update(2 * k, k)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.full_like(k, 6.0))


def test_zero_rows_and_zero_tokens():
    cache = filled(True)
    adopt(cache, 2)
    cache.update(torch.zeros(3, 2, 0, 8), torch.zeros(3, 2, 0, 8), 0)
    assert cache.get_seq_length() == 5
    cache.batch_select_indices(torch.zeros(0, dtype=torch.long))
    keys, _ = cache.update(torch.zeros(0, 2, 1, 8), torch.zeros(0, 2, 1, 8), 0)
    assert keys.shape == (0, 2, 6, 8)


def test_bad_input_gets_one_sentence_and_writes_nothing():
    layer = layer_of()
    before = layer.keys.clone()
    one = torch.ones(3, 2, 1, 8)
    for keys, values, message in [
        (one[:1], one[:1], r"keys of shape \[3, 2, 1, 8\] in torch.float32 on cpu to go on with, got \[1, 2, 1, 8\]"),
        (
            one,
            one[..., :4],
            r"values of shape \[3, 2, 1, 8\] in torch.float32 on cpu to go on with, got \[3, 2, 1, 4\]",
        ),
        (one, one[:, :, :0], r"values of shape \[3, 2, 1, 8\] .*, got \[3, 2, 0, 8\]"),
        (one.bfloat16(), one, r"keys of shape .* torch.float32 on cpu to go on with, got .* in torch.bfloat16 on cpu"),
        (one, one.double(), r"values of shape .*, got \[3, 2, 1, 8\] in torch.float64 on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.update(keys, values)
    with pytest.raises(ValueError, match="expected decoder layer 0 to use its own cache layer, got 1"):
        layer.append(KeyValues(one, one, 1), torch.arange(3))
    assert torch.equal(layer.keys, before)
    with pytest.raises(ValueError, match="expected 4 layers like the model's, got 2"):
        adopt(transformers.DynamicCache(config=CONFIG), 4)


def test_a_large_cache_lies_on_memory_of_its_own():
    """Keys of 4 MB and more are on huge pages: the same values, growth and independence of copies."""
    from transformers import DynamicCache

    cache = DynamicCache()
    adopt(cache, 1)
    keys, values = torch.randn(2, 1, 8, 3000, 64, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 2600), (2600, 2601), (2601, 3000)):
        held = cache.update(keys[:, :, start:end], values[:, :, start:end], 0)
    assert torch.equal(held[0], keys) and torch.equal(held[1], values)
    before = held[0].clone()
    cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert torch.equal(before, keys) and cache.get_seq_length() == 3001
