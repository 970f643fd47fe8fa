"""kv_fill beside a torch loop over the layers and beside the machine's floor: `pytest benchmarks/bench_kv_fill.py`.

The stack is that of a model of a billion parameters: 16 layers, D=2048, 8 heads of 64, all of them skipped. The sides
of a case run in turns: kv_fill for n tokens at once, the same tokens one by one, and what a torch user writes for each
layer (norm, two projections, rotary embedding, into the cache). The floor is one read of the weights; read bandwidth
is measured in every turn, the best of 2 and 4 streams on small and huge pages, and its median stands beside the medians
of the sides.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

import peaks
from exeunt.ops import KVCache, KVLayer, KVStack, kv_fill

LAYERS, D, HEADS, SIZE = 16, 2048, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TURNS = 21


@pytest.fixture(scope="module")
def library():
    """Measures bandwidth."""
    return peaks.library()


def make_stack(dtype):
    def weight():
        return (torch.randn(HEADS, SIZE, D) / D**0.5).to(dtype)

    return KVStack([KVLayer(weight(), weight(), norm_weight=torch.ones(D, dtype=dtype)) for _ in range(LAYERS)],
                   norm="rms", eps=1e-5)  # fmt: skip


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
def test_kv_fill(benchmark, library, dtype, n):
    stack = make_stack(DTYPES[dtype])
    keys, values = ([torch.zeros(8, HEADS, 256, SIZE, dtype=stack.dtype) for _ in range(LAYERS)] for _ in range(2))
    cache, hidden = KVCache(keys, values), torch.randn(n, D).to(stack.dtype)
    places = torch.zeros(n, dtype=torch.int64), torch.arange(n) % 8, torch.arange(n) // 8
    rotary = tuple(torch.randn(2, n, SIZE).to(stack.dtype))

    def at_once():
        kv_fill(hidden, *places, stack, cache, rotary=rotary)

    def one_by_one():
        for i in range(n):
            one = slice(i, i + 1)
            pair = rotary[0][one], rotary[1][one]
            kv_fill(hidden[one], *(t[one] for t in places), stack, cache, rotary=pair)

    sides = {
        "kv_fill": at_once,
        "one by one": one_by_one,
        "torch": lambda: torch_loop(hidden, *places[1:], stack, keys, values, rotary),
    }
    nbytes = 2 * LAYERS * stack.layers[0].key.nbytes
    threads = torch.get_num_threads()
    times = {name: [] for name in ("floor", *sides)}
    with torch.inference_mode():
        for call in sides.values():
            call()
        for _ in range(TURNS):
            for name, call in sides.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            best = max(library.read_bandwidth(1 << 28, threads, s, h, 1) for s in (2, 4) for h in (0, 1))
            times["floor"].append(nbytes / (best * 1e9))
        benchmark.pedantic(at_once, rounds=3)
    benchmark.extra_info.update(
        fill=f"{dtype}, {n} rows" if n > 1 else f"{dtype}, one row", threads=threads,
        sides={name: statistics.median(t) * 1e3 for name, t in times.items()},
    )  # fmt: skip
