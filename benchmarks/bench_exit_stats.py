"""exit_stats beside what a torch user writes and beside the machine's floor: `pytest benchmarks/bench_exit_stats.py`.

One test is one shape. Its sides run in turns, so that a noisy machine is as noisy for each: the op on the weight as it
lies, on a packed copy, on an int8 copy; the torch pipeline (norm, linear, float32 log-softmax, top 2, entropy), eager
and under torch.compile. The floor is the slower of two: a read of the same head, plain loads in 1, 2, 4 or 8 streams a
thread, whichever is best, in turns with the sides; and its multiply-adds at the peak (peaks.py). The head lies on huge
pages, where `exeunt.huge_pages` puts it, or on small ones as torch allocates it; packed copies are always on huge ones.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table. All shapes take an hour; pick with
`-k`, for example `-k "huge and bf16 and (49152 or 32000)"`.
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
SECONDS = 1.5  # that a shape's sides share, after warm-up
TURNS = (5, 40)


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
    """One head at a time in memory, with its packed copies; they are the large tensors."""
    kept = {}

    def make(*key):
        if key not in kept:
            kept.clear()
            v, d, dtype, pages = key
            head = (torch.randn(v, d) / d**0.5).to(dtype)
            if pages == "huge":
                exeunt.huge_pages(torch.nn.ParameterList([head]))
            kept[key] = head, exeunt.ops.PackedHead(head), exeunt.ops.PackedHead(head, torch.int8)
        return kept[key]

    return make


@pytest.fixture(scope="module")
def machine():
    """Multiply-add peaks in FLOP/s by the dtype that reaches them, and the library that measures bandwidth."""
    lib = peaks.library()
    _, rates = peaks.measure(rounds=4)
    best = {name.split()[0]: max(r for n, r in rates.items() if n.startswith(name.split()[0])) for name in rates}
    wide = best.get("float32", float("inf"))
    return lib, {"fp32": wide * 1e9, "fp16": wide * 1e9, "bf16": best.get("bfloat16", wide) * 1e9}


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("v,d", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", ["huge", "small"])
def test_exit_stats(benchmark, heads, machine, v, d, dtype, n, pages):
    head, packed, int8 = heads(v, d, DTYPES[dtype], pages)
    hidden, weight = torch.randn(n, d).to(head.dtype), torch.ones(d, dtype=head.dtype)
    torch.compiler.reset()
    compiled = torch.compile(pipeline, dynamic=False)
    sides = {
        "exeunt": lambda: fused(hidden, head, weight),
        "packed": lambda: fused(hidden, packed, weight),
        "int8": lambda: fused(hidden, int8, weight),
        "torch": lambda: pipeline(hidden, head, weight),
        "torch.compile": lambda: compiled(hidden, head, weight),
    }
    lib, peak = machine
    threads = torch.get_num_threads()
    times = {side: [] for side in (*sides, *STREAMS)}
    with torch.inference_mode():
        for call in sides.values():
            call()
            call()
        until = time.perf_counter() + SECONDS
        while len(times["torch"]) < TURNS[0] or (time.perf_counter() < until and len(times["torch"]) < TURNS[1]):
            for side, call in sides.items():
                start = time.perf_counter()
                call()
                times[side].append(time.perf_counter() - start)
            for streams in STREAMS:
                rate = lib.read_rate(head.data_ptr(), head.nbytes, threads, streams)
                times[streams].append(head.nbytes / (rate * 1e9))
        benchmark.pedantic(sides["exeunt"], rounds=3)
    median = {side: statistics.median(t) for side, t in times.items()}
    read = min(median[streams] for streams in STREAMS)
    floor = max(read, 2 * n * v * d / peak[dtype])
    benchmark.extra_info.update(
        v=v, d=d, dtype=dtype, n=n, pages=pages, threads=threads, bandwidth=head.nbytes / read / 1e9, floor=floor * 1e3,
        bound="read" if read == floor else "multiply-add", sides={side: median[side] * 1e3 for side in sides},
    )  # fmt: skip
