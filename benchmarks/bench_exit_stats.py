"""exit_stats beside what a torch user writes and beside the machine's floor: `pytest benchmarks/bench_exit_stats.py`.

One test is one shape. Its sides run in turns, so that a noisy machine is as noisy for each: the op on the weight as it
lies, on a packed copy, on an int8 copy; the torch pipeline (norm, linear, float32 log-softmax, top 2, entropy), eager
and under torch.compile. There are as many heads of each kind as fill 1 GB (16 at most), and a side goes through all of
its own: no side finds its head in a processor's cache, and what Python brings along is as warm as it is in a loop of
checks. The floor is the slower of two: a read of the heads as they lie, plain loads in 1, 2, 4 or 8 streams a thread,
whichever is best, which goes through them likewise; and its multiply-adds at the peak (peaks.py). Heads lie on huge
pages, where `exeunt.huge_pages` puts them, or on small ones as torch allocates them; packed copies are always on huge
ones.

`python benchmarks/table.py FILE ...` turns what `--benchmark-json=FILE` wrote into a table. All cases take an hour;
pick with `-k`, for example `-k "huge and bf16 and (49152 or 32000)"`.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

import exeunt
import peaks

SHAPES = [(2, 768), (35, 384), (8192, 384), (49152, 576), (50257, 768), (32000, 4096), (128256, 2048), (151936, 2560)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ROWS = [1, 2, 4, 8, 16, 32, 64, 256]
STREAMS = (1, 2, 4, 8)
TURNS, PASSES = 2, 3  # turns of the sides; each goes through its heads so often
BYTES, MOST_HEADS = 1 << 30, 16  # of each kind


def pipeline(hidden, head, weight):
    """Norm, full logits, float32 log-softmax, the two largest and the entropy: every measure of ExitStats."""
    logits = F.linear(F.rms_norm(hidden, weight.shape, weight, 1e-5), head).float()
    log_p = logits.log_softmax(-1)
    top = log_p.topk(2, -1)
    return top.indices[:, 0], top.values, -(log_p.exp() * log_p).sum(-1)


def fused(hidden, head, weight):
    return exeunt.ops.exit_stats(hidden, head, norm="rms", norm_weight=weight, eps=1e-5)


@pytest.fixture(scope="module")
def heads():
    """The heads of one shape at a time: as they lie, packed, int8."""
    kept = {}

    def make(*key):
        if key not in kept:
            kept.clear()
            v, d, dtype, pages = key
            first = (torch.randn(v, d) / d**0.5).to(dtype)

            def many(nbytes, head):
                return [head() for _ in range(min(-(-BYTES // nbytes), MOST_HEADS))]

            lying = many(first.nbytes, first.clone)
            if pages == "huge":
                exeunt.huge_pages(torch.nn.ParameterList(lying))
            packed = many(first.nbytes, lambda: exeunt.ops.PackedHead(first))
            kept[key] = lying, packed, many(v * d, lambda: exeunt.ops.PackedHead(first, torch.int8)), first
        return kept[key][:3]

    return make


@pytest.fixture(scope="module")
def machine():
    """Multiply-add peaks in FLOP/s by the dtype that reaches them, and the library that measures bandwidth."""
    lib = peaks.library()
    _, rates = peaks.measure(rounds=4)
    best = {name.split()[0]: max(r for n, r in rates.items() if n.startswith(name.split()[0])) for name in rates}
    wide = best.get("float32", float("inf"))
    # A packed float32 product is six bfloat16 ones, a float16 one four: csrc/cpu/product_split.inc.
    half = best.get("bfloat16", wide)
    return lib, {"fp32": max(wide, half / 6) * 1e9, "fp16": max(wide, half / 4) * 1e9, "bf16": half * 1e9}


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("v,d", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", ["huge", "small"])
def test_exit_stats(benchmark, heads, machine, v, d, dtype, n, pages):
    lying, packed, int8 = heads(v, d, DTYPES[dtype], pages)
    nbytes = lying[0].nbytes
    hidden, weight = torch.randn(n, d).to(lying[0].dtype), torch.ones(d, dtype=lying[0].dtype)
    torch.compiler.reset()
    compiled = torch.compile(pipeline, dynamic=False)
    sides = {
        "exeunt": (fused, lying),
        "packed": (fused, packed),
        "int8": (fused, int8),
        "torch": (pipeline, lying),
        "torch.compile": (compiled, lying),
    }
    lib, peak = machine
    threads = torch.get_num_threads()
    times = {side: [] for side in (*sides, *STREAMS)}
    with torch.inference_mode():
        for call, its in sides.values():
            call(hidden, its[0], weight)
            call(hidden, its[-1], weight)
        for _ in range(TURNS):
            for side, (call, its) in sides.items():
                for head in its * PASSES:
                    start = time.perf_counter()
                    call(hidden, head, weight)
                    times[side].append(time.perf_counter() - start)
            for streams in STREAMS:
                for head in lying * PASSES:
                    rate = lib.read_rate(head.data_ptr(), nbytes, threads, streams)
                    times[streams].append(nbytes / (rate * 1e9))
        benchmark.pedantic(lambda: fused(hidden, lying[0], weight), rounds=3)
    median = {side: statistics.median(t) for side, t in times.items()}
    read = min(median[streams] for streams in STREAMS)
    floor = max(read, 2 * n * v * d / peak[dtype])
    benchmark.extra_info.update(
        v=v, d=d, dtype=dtype, n=n, pages=pages, threads=threads, bandwidth=nbytes / read / 1e9, floor=floor * 1e3,
        bound="read" if read == floor else "multiply-add", sides={side: median[side] * 1e3 for side in sides},
    )  # fmt: skip
