"""kv_fill beside a torch loop over the layers and beside the machine's floor: `pytest benchmarks/bench_kv_fill.py`.

The stack is that of a model of a billion parameters: 16 layers, D=2048, 8 heads of 64, all of them skipped. The sides
of a case run in turns: kv_fill for n tokens at once, the same tokens one by one, and what a torch user writes for each
layer (norm, two projections, rotary embedding, into the cache). Before every call torch sums 768 MB, as the rest of a
model would come between two decoding steps: weights, cache and code have left the caches, threads are awake.

The floor is one read of the weights. Read bandwidth is measured three times a case, the best of 4 and 8 streams a
thread on small and huge pages, over 1.5 GB: a last-level cache may hold all of less. Its median stands beside the
medians of the sides. The weights lie on huge pages, where `exeunt.huge_pages` puts a model's, or on small ones as torch
allocates them.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

import exeunt
import peaks
from exeunt.ops import KVCache, KVLayer, KVStack, kv_fill

LAYERS, D, HEADS, SIZE = 16, 2048, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TURNS = 12


@pytest.fixture(scope="module")
def library():
    """Measures bandwidth."""
    return peaks.library()


def make_stack(dtype, pages):
    weights = [(torch.randn(HEADS, SIZE, D) / D**0.5).to(dtype) for _ in range(2 * LAYERS)]
    if pages == "huge":
        exeunt.huge_pages(torch.nn.ParameterList(weights))
    ones = torch.ones(D, dtype=dtype)
    layers = [KVLayer(*weights[2 * i : 2 * i + 2], norm_weight=ones) for i in range(LAYERS)]
    return KVStack(layers, norm="rms", eps=1e-5)


def torch_loop(hidden, rows, slots, stack, keys, values, rotary):
    """The layers' own work, without the modules around it."""
    cos, sin = (t[:, None] for t in rotary)
    for own, key_cache, value_cache in zip(stack.layers, keys, values, strict=True):
        x = F.rms_norm(hidden, (D,), own.norm_weight, stack.eps)
        key = F.linear(x, own.key.view(-1, D)).view(-1, HEADS, SIZE)
        value = F.linear(x, own.value.view(-1, D)).view(-1, HEADS, SIZE)
        a, b = key.chunk(2, -1)
        key_cache[rows, :, slots] = key * cos + torch.cat((-b, a), -1) * sin
        value_cache[rows, :, slots] = value


@pytest.mark.parametrize("n", [1, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", ["huge", "small"])
def test_kv_fill(benchmark, library, dtype, n, pages):
    stack = make_stack(DTYPES[dtype], pages)
    keys, values = ([torch.zeros(8, HEADS, 256, SIZE, dtype=stack.dtype) for _ in range(LAYERS)] for _ in range(2))
    cache, hidden = KVCache(keys, values), torch.randn(n, D).to(stack.dtype)
    places = torch.zeros(n, dtype=torch.int64), torch.arange(n) % 8, torch.arange(n) // 8
    rotary = tuple(torch.randn(2, n, SIZE).to(stack.dtype))

    def at_once():
        kv_fill(hidden, *places, stack, cache, rotary=rotary)

    def alone(i):
        one = slice(i, i + 1)
        own = hidden[one], *(t[one] for t in places)
        pair = rotary[0][one], rotary[1][one]
        return lambda: kv_fill(*own, stack, cache, rotary=pair)

    sides = {
        "kv_fill": [at_once],
        "one by one": [alone(i) for i in range(n)],
        "torch": [lambda: torch_loop(hidden, *places[1:], stack, keys, values, rotary)],
    }
    nbytes = 2 * LAYERS * stack.layers[0].key.nbytes
    threads, other = torch.get_num_threads(), torch.ones(3 << 26)
    times = {name: [] for name in ("floor", *sides)}

    def cold(calls):
        seconds = 0.0
        for call in calls:
            other.sum()
            start = time.perf_counter()
            call()
            seconds += time.perf_counter() - start
        return seconds

    with torch.inference_mode():
        for calls in sides.values():
            cold(calls)
        for turn in range(TURNS):
            for name, calls in sides.items():
                times[name].append(cold(calls))
            if turn % (TURNS // 3) == 0:
                best = max(library.read_bandwidth(3 << 29, threads, s, h, 1) for s in (4, 8) for h in (0, 1))
                times["floor"].append(nbytes / (best * 1e9))
        benchmark.pedantic(at_once, rounds=3)
    benchmark.extra_info.update(
        fill=f"{dtype}, {n} rows" if n > 1 else f"{dtype}, one row", pages=pages, threads=threads,
        sides={name: statistics.median(t) * 1e3 for name, t in times.items()},
    )  # fmt: skip
