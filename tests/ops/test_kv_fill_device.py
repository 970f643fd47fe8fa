"""kv_fill on a CUDA device: graphs, streams, no waiting, tensors in different places."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ops
from exeunt.ops import KVCache, KVLayer, KVStack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.on_device(), reason="needs a CUDA device and exeunt._cuda"),
]
LAYERS, BATCH, WIDTH, HEADS, SIZE = 3, 4, 96, 2, 32


def made(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def on_device(n=5):
    layers = [
        KVLayer(made(HEADS, SIZE, WIDTH), made(HEADS, SIZE, WIDTH), norm_weight=made(WIDTH)) for _ in range(LAYERS)
    ]
    every = torch.arange(n, device="cuda")
    places = [every % (LAYERS + 1), every % BATCH, every // BATCH]
    return [made(n, WIDTH), *places, KVStack(layers, norm="rms"), empty_cache()]


def empty_cache():
    keys, values = ([torch.zeros(BATCH, HEADS, 8, SIZE, device="cuda").bfloat16() for _ in range(LAYERS)] for _ in "kv")
    return KVCache(keys, values)


def written(given):
    cache = empty_cache()
    ops.kv_fill(*given[:-1], cache)
    return torch.stack(cache.keys + cache.values)


def test_a_captured_graph_follows_its_inputs():
    given = on_device()
    cache = given[-1]
    ops.kv_fill(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.kv_fill(*given)
    for first, slot in ((0, 3), (LAYERS, 1), (1, -1), (2, 0)):
        given[0].copy_(torch.randn(given[0].shape))
        given[1].fill_(first)
        given[3].copy_(torch.arange(5, device="cuda").div(BATCH, rounding_mode="floor") + slot)
        for t in cache.keys + cache.values:
            t.zero_()
        graph.replay()
        assert torch.equal(torch.stack(cache.keys + cache.values), written(given))


def test_it_never_waits_for_the_device():
    given = on_device()
    ops.kv_fill(*given)  # the tables reach the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.kv_fill(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream():
    given = on_device()
    expected = written(given)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [given[0] + 0, *given[1:]]
        ops.kv_fill(*late)
    stream.synchronize()
    assert torch.equal(torch.stack(given[-1].keys + given[-1].values), expected)


@pytest.mark.parametrize("at,name", [(1, "from_layer"), (2, "rows"), (3, "slots")])
def test_lists_in_another_place_get_one_sentence(at, name):
    given = on_device()
    given[at] = given[at].cpu()
    with pytest.raises(ValueError, match=rf"^kv_fill: {name} must be on cuda:0 like the stack, got cpu"):
        ops.kv_fill(*given)
