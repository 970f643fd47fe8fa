"""The checks that read no vocabulary, a call each, beside torch: `pytest benchmarks/bench_small_head.py`.

A case is a check of a few rows; its sides run in turns, many calls at a time, so caches are warm: what is measured is
what a call costs beside its few multiply-adds. In a model, weights and code have left the caches between two checks,
and a call takes several times as long on either side (docs/kernels.md). `attach` uses the bound check (`ops.Check`),
which judges, too: there torch takes softmax, the two largest, their difference, a comparison, and counts.

The floor is a plain read of the weights as they lie, likewise, the best of 1 to 8 streams. Some 1.6 us of it are a call
from Python and the threads', which the read of two classes shows. Eight float32 rows take longer to multiply.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

import peaks
from exeunt import ops

TURNS, CALLS, STREAMS = 21, 50, (1, 2, 4, 8)


def layers(v, d, pooled, dtype=torch.float32):
    """A head and what comes before it, and both by torch."""
    weight, bias = (torch.randn(v, d) / d**0.5).to(dtype), torch.zeros(v, dtype=dtype)
    pool = ((torch.randn(d, d) / d**0.5).to(dtype), torch.zeros(d, dtype=dtype)) if pooled else (None, None)

    def stock(x):
        return F.linear(torch.tanh(F.linear(x, *pool)) if pooled else x, weight, bias)

    return weight, bias, pool, stock


def normed(v, d, pooled=False):
    def sides(n):
        hidden, norm = torch.randn(n, d), torch.ones(d)
        weight, bias, pool, stock = layers(v, d, pooled)
        options = dict(pooler_weight=pool[0], pooler_bias=pool[1], norm="layer", norm_weight=norm, eps=1e-5)
        ours = lambda: ops.small_head(hidden, weight, bias, **options)  # noqa: E731
        return ours, lambda: stock(F.layer_norm(hidden, (d,), norm, None, 1e-5)), pool[0] if pooled else weight

    return sides


def probe(n, d=768):
    hidden, norm = torch.randn(n, d), torch.ones(d)
    weight, bias, _, stock = layers(1, d, False)
    ours = lambda: ops.probe(hidden, weight[0], bias, norm="layer", norm_weight=norm, eps=1e-5)  # noqa: E731
    return ours, lambda: stock(F.layer_norm(hidden, (d,), norm, None, 1e-5)).sigmoid()[:, 0], weight


def saturation(n, d=768):
    hidden, before = torch.randn(2, n, d)
    return lambda: ops.saturation(hidden, before), lambda: F.cosine_similarity(hidden, before, dim=-1), before


def bound(v, d, pooled=False, dtype=torch.float32):
    def sides(n):
        hidden = torch.randn(n, 1, d).to(dtype)
        weight, bias, pool, stock = layers(v, d, pooled, dtype)
        check = ops.Check(weight, bias, *pool, measure="margin", threshold=0.5, tokens=False)

        def judged():
            top = stock(hidden[:, 0]).softmax(-1).topk(2, -1).values
            return int((top[:, 0] - top[:, 1] > 0.5).sum())

        return lambda: check(hidden, None)[0], judged, pool[0] if pooled else weight

    return sides


CASES = {
    "norm and head, 2 x 768": normed(2, 768),
    "norm and head, 35 x 384": normed(35, 384),
    "norm and head, 64 x 1024": normed(64, 1024),
    "norm, pooler and head, 2 x 384": normed(2, 384, pooled=True),
    "norm, pooler and head, 2 x 768": normed(2, 768, pooled=True),
    "norm, probe, 768": probe,
    "saturation, 768": saturation,
    "bound check, 2 x 768": bound(2, 768),
    "bound check, 35 x 384": bound(35, 384),
    "bound check, pooler, 2 x 384": bound(2, 384, pooled=True),
    "bound check, pooler, 2 x 768": bound(2, 768, pooled=True),
    "bound check, pooler, 2 x 384, bf16": bound(2, 384, pooled=True, dtype=torch.bfloat16),
    "bound check, pooler, 2 x 768, bf16": bound(2, 768, pooled=True, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def library():
    return peaks.library()


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_small_head(benchmark, library, case, n):
    torch.manual_seed(0)  # of bfloat16 rows near the threshold torch's own rounding lets another number leave
    ours, theirs, weight = CASES[case](n)
    at, threads = (weight.data_ptr(), weight.nbytes), torch.get_num_threads()
    sides = {"exeunt": ours, "torch": theirs}
    sides |= {streams: lambda streams=streams: library.read_rate(*at, threads, streams) for streams in STREAMS}
    times = {name: [] for name in sides}
    with torch.inference_mode():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
        for _ in range(TURNS):
            for name, call in sides.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append((time.perf_counter() - start) / CALLS)
        benchmark.pedantic(ours, rounds=3)
    median = {name: statistics.median(t) * 1e6 for name, t in times.items()}
    benchmark.extra_info.update(
        check=f"{case}, {n} rows" if n > 1 else f"{case}, one row", threads=threads,
        sides={"floor": min(median[streams] for streams in STREAMS), "exeunt": median["exeunt"],
               "torch": median["torch"]},
    )  # fmt: skip
