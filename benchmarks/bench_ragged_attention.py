"""ragged_attention beside padded scaled_dot_product_attention: `pytest benchmarks/bench_ragged_attention.py`.

32 heads over 8 key heads of 64. The sides of a case run in turns: ragged_attention over the cache as it lies, and
torch's scaled_dot_product_attention over the padded batch, with the boolean mask that stock transformers makes (none
where all rows are of one length and bring one token), once by enable_gqa and once over repeated keys and values, as
stock layers do. Keys and values lie on huge pages, as in exeunt's cache, but for the case that says otherwise.

There are as many caches as fill 1 GB, the layers of a decoder, and a side goes through all of them three times in a
row, as in decoding steps: no side finds its keys in a processor's cache, and what Python brings along is as warm as it
is between layers. The floor is one read of the keys and values that are there, by plain loads, which goes through the
same caches. Medians of all calls, after one read of everything: memory that was just written is slow once, for
whoever comes first.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

import peaks
from exeunt.memory import zeros_on_huge_pages
from exeunt.ops import ragged_attention

HEADS, KV_HEADS, SIZE = 32, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
STREAMS = (1, 2, 4, 8)
CACHES = 1 << 30  # bytes of all layers
SMALL_PAGES = "one row of 32768 keys, small pages"
#: Lengths of the rows, and queries of each.
CASES = {
    "16 rows of 64..2048 keys": ([64 + 1984 * ((7 * r) % 16) // 15 for r in range(16)], 1),
    "16 rows of 2048 keys": ([2048] * 16, 1),
    "16 rows of 2048 keys, 8 queries each": ([2048] * 16, 8),
    "one row of 32768 keys": ([32768], 1),
    SMALL_PAGES: ([32768], 1),
    "one prompt of 1024 tokens": ([1024], 1024),
}
TURNS, PASSES = 2, 3  # turns of the sides; each goes through the caches so often


def layers_of(lengths, dtype, huge):
    """The caches (keys, values)."""
    shape = (len(lengths), KV_HEADS, max(lengths), SIZE)
    first = [torch.randn(shape).to(dtype) for _ in range(2)]
    layers = -(-CACHES // (2 * first[0].nbytes))
    return [[zeros_on_huge_pages(shape, dtype).copy_(t) if huge else t.clone() for t in first] for _ in range(layers)]


def sides_of(lengths, queries, dtype, layer):
    """The calls of a case on a layer's keys and values."""
    rows, most = len(lengths), max(lengths)
    held = torch.tensor(lengths)
    q = torch.randn(rows, queries, HEADS, SIZE).to(dtype)
    bounds, listed = torch.arange(rows + 1) * queries, torch.arange(rows)
    at = held[:, None] - queries + torch.arange(queries)  # [rows, queries]
    mask = (torch.arange(most) <= at[..., None])[:, None]  # right-padded here; where padding lies costs torch nothing
    plain = queries == 1 and min(lengths) == most
    whole = queries == most
    options = dict(is_causal=True) if whole else dict(attn_mask=None if plain else mask)
    times = HEADS // KV_HEADS

    def ours(keys, values):
        return ragged_attention(q.view(-1, HEADS, SIZE), keys, values, bounds, listed, held)

    def grouped(keys, values):
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True, **options)

    def repeated(keys, values):
        wide = (t.repeat_interleave(times, 1) for t in (keys, values))
        return F.scaled_dot_product_attention(q.transpose(1, 2), *wide, **options)

    got, want = ours(*layer).view(q.shape).float(), grouped(*layer).transpose(1, 2).float()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 if dtype != torch.float32 else 1e-4)
    return {"ragged_attention": ours, "sdpa, grouped": grouped, "sdpa, repeated": repeated}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_attention(benchmark, dtype, case):
    lengths, queries = CASES[case]
    threads, library = torch.get_num_threads(), peaks.library()
    times = defaultdict(list)
    with torch.inference_mode():
        layers = layers_of(lengths, DTYPES[dtype], case != SMALL_PAGES)
        sides = sides_of(lengths, queries, DTYPES[dtype], layers[0])
        share = sum(lengths) / (len(lengths) * max(lengths))  # of a cache that is there

        def read(layer, streams):
            rates = (library.read_rate(t.data_ptr(), t.nbytes, threads, streams) for t in layer)
            return sum(layer[0].nbytes * share / (rate * 1e9) for rate in rates)

        for layer in layers:
            read(layer, 1)
        for _ in range(TURNS):
            for name, call in sides.items():
                for layer in layers * PASSES:
                    start = time.perf_counter()
                    call(*layer)
                    times[name].append(time.perf_counter() - start)
            for streams in STREAMS:
                times[streams] += [read(layer, streams) for layer in layers * PASSES]
        benchmark.pedantic(lambda: sides["ragged_attention"](*layers[0]), rounds=3)
    median = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    benchmark.extra_info.update(
        attention=f"{dtype}, {case}", threads=threads,
        sides={name: median[name] for name in sides} | {"floor": min(median[s] for s in STREAMS)},
    )  # fmt: skip
