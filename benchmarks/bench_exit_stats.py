"""exit_stats beside what a torch user writes and beside the machine's floor: `pytest benchmarks/bench_exit_stats.py`.

One test is one shape. Its sides run in turns, and ratios are of medians of the same turn, so that a noisy machine is
as noisy for each: the op on the weight as it lies, on a packed copy, on an int8 copy; the torch pipeline (norm,
linear, float32 log-softmax, top 2, entropy), eager and under torch.compile; and the peers' way, which knows no
entropy. There are as many heads of each kind as fill 1 GB (16 at most), and a side goes through all of its own in a
turn: no side finds its head in a processor's cache, and what Python brings along is as warm as it is in a loop of
checks. The floor is the slower of two, both measured in the same turns: a read of the heads as they lie, plain loads
in 1, 2, 4 or 8 streams a thread, whichever is best, which goes through them likewise; and multiply-adds in registers,
for a millisecond or some (peaks.py), scaled to as many as the case has. Heads lie on huge pages, where
`exeunt.huge_pages` puts them, or on small ones as torch allocates them; packed copies are always on huge ones.

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
TURNS = 6  # of the sides; each goes through its heads
BYTES, MOST_HEADS = 1 << 30, 16  # of each kind


def pipeline(hidden, head, weight):
    """Norm, full logits, float32 log-softmax, the two largest and the entropy: every measure of ExitStats."""
    logits = F.linear(F.rms_norm(hidden, weight.shape, weight, 1e-5), head).float()
    log_p = logits.log_softmax(-1)
    top = log_p.topk(2, -1)
    return top.indices[:, 0], top.values, -(log_p.exp() * log_p).sum(-1)


def peers(hidden, head, weight):
    """What published systems run at an exit: norm, full logits, float32 softmax and its two largest."""
    return F.linear(F.rms_norm(hidden, weight.shape, weight, 1e-5), head).float().softmax(-1).topk(2, -1)


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
    """The library that measures, and by dtype the fastest multiply-adds: which peak, and how many of them make one."""
    lib = peaks.library()
    _, rates = peaks.measure(rounds=4)

    def fastest(each):
        kinds = ((i, name.split()[0], rate) for i, (name, rate) in enumerate(rates.items()))
        found = [(rate / each[kind], i, each[kind]) for i, kind, rate in kinds if kind in each]
        return max(found)[1:] if found else None  # peaks.cpp knows those of AVX-512 and AMX

    # A packed float32 product is six bfloat16 ones, a float16 one four: csrc/cpu/product_split.inc.
    return lib, {"fp32": fastest({"float32": 1, "bfloat16": 6}), "fp16": fastest({"float32": 1, "bfloat16": 4}),
                 "bf16": fastest({"float32": 1, "bfloat16": 1})}  # fmt: skip


def seconds(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def read(lib, head, threads, streams):
    """Seconds that a plain read takes."""
    return head.nbytes / (lib.read_rate(head.data_ptr(), head.nbytes, threads, streams) * 1e9)


def multiply_adds(lib, peak, count, threads):
    """Seconds that so many take; 0 where nobody knows the peak."""
    if peak is None:
        return 0.0
    which, each = peak
    return 2 * count * each / (lib.peak_rate(which, threads, 1) * 1e9)


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
        "peers": (peers, lying),
    }
    lib, peak = machine
    threads = torch.get_num_threads()
    turns = []
    with torch.inference_mode():
        for call, its in sides.values():
            call(hidden, its[0], weight)
            call(hidden, its[-1], weight)
        for _ in range(TURNS):
            times = {side: [seconds(call, hidden, head, weight) for head in its] for side, (call, its) in sides.items()}
            reads = [[read(lib, head, threads, streams) for head in lying] for streams in STREAMS]
            adds = [multiply_adds(lib, peak[dtype], n * v * d, threads) for _ in lying]
            turn = {side: statistics.median(t) for side, t in times.items()}
            turn["read"], turn["multiply-add"] = min(map(statistics.median, reads)), statistics.median(adds)
            turns.append(turn | {"floor": max(turn["read"], turn["multiply-add"])})
        benchmark.pedantic(lambda: fused(hidden, lying[0], weight), rounds=3)
    median = {side: statistics.median(turn[side] for turn in turns) for side in turns[0]}
    # How many times a side's time the floor, or a peer's, is.
    ratios = {
        f"{other} / {side}": statistics.median(turn[other] / turn[side] for turn in turns)
        for side in ("exeunt", "packed")
        for other in ("floor", "torch", "torch.compile", "peers")
    }
    bound = "read" if median["read"] > median["multiply-add"] else "multiply-add"
    benchmark.extra_info.update(
        v=v, d=d, dtype=dtype, n=n, pages=pages, threads=threads, bandwidth=nbytes / median["read"] / 1e9,
        floor=median["floor"] * 1e3, bound=bound, sides={side: median[side] * 1e3 for side in sides}, ratios=ratios,
    )  # fmt: skip
