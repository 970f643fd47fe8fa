"""kv_fill beside a torch loop over the layers and beside the machine's floor: `pytest benchmarks/bench_kv_fill.py`.

A stack is that of a model of a billion parameters: 16 layers, D=2048, 8 heads of 64, all of them skipped. The sides
of a case run in turns: kv_fill for n tokens at once, over the model's own weights and over packed ones, the same tokens
one by one, and what a torch user writes for each layer (norm, two projections, rotary embedding, into the cache). There
are as many stacks as fill 1 GB, and a side goes through all of them three times in a row: no side finds its weights in
a processor's cache, and what Python brings along is as warm as it is between steps. They fill one cache, on huge pages
as exeunt's own.

The floor is one read of the weights, plain loads in 1, 2, 4 or 8 streams a thread, whichever is best, which goes
through the same stacks. Weights that lie row by row can't be read so: a product takes a line of each of 16 rows in
turn. What plain loads get in that order is the second floor. Weights lie on huge pages, where `exeunt.huge_pages` puts
a model's, or on small ones as torch allocates them. Medians of all calls, after one read of everything: memory that was
just written is slow once, for whoever comes first.

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
from exeunt.memory import zeros_on_huge_pages
from exeunt.ops import KVCache, KVLayer, KVStack, kv_fill

LAYERS, D, HEADS, SIZE = 16, 2048, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TURNS, PASSES = 2, 3  # turns of the sides; each goes through the stacks so often
STREAMS = (1, 2, 4, 8)
STACKS = 1 << 30  # bytes of their weights


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
    return KVStack(layers, norm="rms", eps=1e-5), KVStack(layers, norm="rms", eps=1e-5, packed=True)


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
    kind, shape = DTYPES[dtype], (8, HEADS, 256, SIZE)
    nbytes = 2 * LAYERS * HEADS * SIZE * D * kind.itemsize
    stacks = [make_stack(kind, pages) for _ in range(STACKS // nbytes)]
    keys, values = ([zeros_on_huge_pages(shape, kind) for _ in range(LAYERS)] for _ in range(2))
    cache, hidden = KVCache(keys, values), torch.randn(n, D).to(kind)
    places = torch.zeros(n, dtype=torch.int64), torch.arange(n) % 8, torch.arange(n) // 8
    rotary = tuple(torch.randn(2, n, SIZE).to(kind))

    def fill(stack, rows=slice(None), packed=False):
        tables = rotary[0][rows], rotary[1][rows]
        own = hidden[rows], *(t[rows] for t in places)
        start = time.perf_counter()
        kv_fill(*own, stack[packed], cache, rotary=tables)
        return time.perf_counter() - start

    def loop(stack):
        start = time.perf_counter()
        torch_loop(hidden, *places[1:], stack[0], keys, values, rotary)
        return time.perf_counter() - start

    def read(stack, rate_of):
        weights = [weight for own in stack[0].layers for weight in (own.key, own.value)]
        return sum(w.nbytes / rate_of(w) / 1e9 for w in weights)

    threads = torch.get_num_threads()
    sides = {
        "kv_fill": fill,
        "packed": lambda stack: fill(stack, packed=True),
        "one by one": lambda stack: sum(fill(stack, slice(i, i + 1)) for i in range(n)),
        "torch": loop,
        "floor in tiles": lambda stack: read(
            stack, lambda w: library.read_tiles_rate(w.data_ptr(), w.nbytes, threads, w.stride(1) * w.itemsize)
        ),
    }
    for streams in STREAMS:
        sides[streams] = lambda stack, streams=streams: read(
            stack, lambda w: library.read_rate(w.data_ptr(), w.nbytes, threads, streams)
        )
    times = {name: [] for name in sides}
    with torch.inference_mode():
        for side in sides.values():
            side(stacks[0])
        for stack in stacks:
            sides[1](stack)
        for _ in range(TURNS):
            for name, side in sides.items():
                times[name] += [side(stack) for stack in stacks * PASSES]
        benchmark.pedantic(lambda: fill(stacks[0]), rounds=3)
    median = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    floor = min(median.pop(streams) for streams in STREAMS)
    benchmark.extra_info.update(
        fill=f"{dtype}, {n} rows" if n > 1 else f"{dtype}, one row", pages=pages, threads=threads,
        sides={"floor": floor} | median,
    )  # fmt: skip
