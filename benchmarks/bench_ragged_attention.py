"""ragged_attention beside padded scaled_dot_product_attention: `pytest benchmarks/bench_ragged_attention.py`.

32 heads over 8 key heads of 64. The sides of a case run in turns: ragged_attention over the cache as it lies, and
torch's scaled_dot_product_attention over the padded batch, with the boolean mask that stock transformers makes (none
where all rows are of one length and bring one token), once by enable_gqa and once over repeated keys and values, as
stock layers do. Keys and values lie on huge pages, as in exeunt's cache, but for the case that says otherwise.

The floor is one read of the keys and values that are there. Before every call 512 MB of other memory are read, in 2 and
in 4 streams a thread: as in a decoding step, which reads the model's weights between two reads of a layer's cache, and
neither side finds its keys in a cache; the better rate is the read bandwidth. (A buffer that is written for each
measurement, as `peaks.py` does it, leaves last-level caches of hundreds of MB full of lines to write back, for which
the side that comes next pays.) Medians of all.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

import peaks
from exeunt.memory import zeros_on_huge_pages
from exeunt.ops import ragged_attention

HEADS, KV_HEADS, SIZE = 32, 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
OTHER = 1 << 29  # bytes that are read between two calls
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
TURNS = 7


@pytest.fixture(scope="module")
def read_other():
    """Reads other memory, and returns the GB/s."""
    library, memory = peaks.library(), zeros_on_huge_pages((OTHER,), torch.uint8)
    memory.fill_(1)
    return lambda: max(library.read_rate(memory.data_ptr(), OTHER, torch.get_num_threads(), s) for s in (2, 4))


def sides_of(lengths, queries, dtype, huge):
    """The calls of a case, and the bytes of the keys and values that they are about."""
    rows, most = len(lengths), max(lengths)
    held = torch.tensor(lengths)
    keys, values = torch.randn(2, rows, KV_HEADS, most, SIZE).to(dtype)
    if huge:
        keys, values = (zeros_on_huge_pages(t.shape, dtype).copy_(t) for t in (keys, values))
    q = torch.randn(rows, queries, HEADS, SIZE).to(dtype)
    bounds, listed = torch.arange(rows + 1) * queries, torch.arange(rows)
    at = held[:, None] - queries + torch.arange(queries)  # [rows, queries]
    mask = (torch.arange(most) <= at[..., None])[:, None]  # right-padded here; where padding lies costs torch nothing
    plain = queries == 1 and min(lengths) == most
    whole = queries == most
    options = dict(is_causal=True) if whole else dict(attn_mask=None if plain else mask)
    times = HEADS // KV_HEADS

    def ours():
        return ragged_attention(q.view(-1, HEADS, SIZE), keys, values, bounds, listed, held)

    def grouped():
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True, **options)

    def repeated():
        wide = (t.repeat_interleave(times, 1) for t in (keys, values))
        return F.scaled_dot_product_attention(q.transpose(1, 2), *wide, **options)

    got, want = ours().view(q.shape).float(), grouped().transpose(1, 2).float()
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 if dtype != torch.float32 else 1e-4)
    nbytes = 2 * sum(lengths) * KV_HEADS * SIZE * keys.element_size()
    return {"ragged_attention": ours, "sdpa, grouped": grouped, "sdpa, repeated": repeated}, nbytes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_attention(benchmark, read_other, dtype, case):
    with torch.inference_mode():
        sides, nbytes = sides_of(*CASES[case], DTYPES[dtype], case != SMALL_PAGES)
        threads = torch.get_num_threads()
        times, rates = {name: [] for name in sides}, []
        for _ in range(TURNS):
            for name, call in sides.items():
                rates.append(read_other())
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        times["floor"] = [nbytes / (rate * 1e9) for rate in rates]
        benchmark.pedantic(sides["ragged_attention"], rounds=3)
    benchmark.extra_info.update(
        attention=f"{dtype}, {case}", threads=threads,
        sides={name: statistics.median(t) * 1e3 for name, t in times.items()},
    )  # fmt: skip
