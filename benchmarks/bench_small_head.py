"""The checks that read no vocabulary, a call each, beside torch: `pytest benchmarks/bench_small_head.py`.

A case is a check of a few rows; its sides run in turns, many calls at a time, so caches are warm: what is measured is
what a call costs beside its few multiply-adds. In a model, weights and code have left the caches between two checks,
and a call takes several times as long on either side (docs/kernels.md). `attach` uses the bound check (`ops.Check`),
which judges, too: there torch takes softmax, the two largest, their difference, a comparison, and counts.

`python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from exeunt import ops

CASES = {  # V, D, with a pooler
    "norm and head, 2 x 768": (2, 768, False),
    "norm and head, 35 x 384": (35, 384, False),
    "norm and head, 64 x 1024": (64, 1024, False),
    "norm, pooler and head, 2 x 384": (2, 384, True),
    "norm, pooler and head, 2 x 768": (2, 768, True),
    "norm, probe, 768": (1, 768, False),
    "saturation, 768": (0, 768, False),
    "bound check, 2 x 768": (2, 768, False),
    "bound check, 35 x 384": (35, 384, False),
    "bound check, pooler, 2 x 384": (2, 384, True),
    "bound check, pooler, 2 x 768": (2, 768, True),
}
TURNS, CALLS = 21, 50


def bound(v, d, pooled, n):
    hidden, weight, bias = torch.randn(n, 1, d), torch.randn(v, d) / d**0.5, torch.zeros(v)
    pool = (torch.randn(d, d) / d**0.5, torch.zeros(d)) if pooled else (None, None)
    check = ops.Check(weight, bias, *pool, measure="margin", threshold=0.5, tokens=False)

    def stock():
        x = hidden[:, 0]
        x = x if pool[0] is None else torch.tanh(F.linear(x, *pool))
        top = F.linear(x, weight, bias).softmax(-1).topk(2, -1).values
        return int((top[:, 0] - top[:, 1] > 0.5).sum())

    return {"exeunt": lambda: check(hidden, None)[0], "torch": stock}


def sides_of(v, d, pooled, n):
    hidden, norm = torch.randn(n, d), torch.ones(d)
    if v == 0:
        before = torch.randn(n, d)
        return {
            "exeunt": lambda: ops.saturation(hidden, before),
            "torch": lambda: F.cosine_similarity(hidden, before, dim=-1),
        }
    weight, bias = torch.randn(v, d) / d**0.5, torch.zeros(v)
    pool = (torch.randn(d, d) / d**0.5, torch.zeros(d)) if pooled else (None, None)
    options = dict(pooler_weight=pool[0], pooler_bias=pool[1], norm="layer", norm_weight=norm, eps=1e-5)

    def stock():
        x = F.layer_norm(hidden, (d,), norm, None, 1e-5)
        x = x if pool[0] is None else torch.tanh(F.linear(x, *pool))
        return F.linear(x, weight, bias)

    if v == 1:
        final = dict(options, final="sigmoid")
        return {"exeunt": lambda: ops.small_head(hidden, weight, bias, **final), "torch": lambda: stock().sigmoid()}
    return {"exeunt": lambda: ops.small_head(hidden, weight, bias, **options), "torch": stock}


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_small_head(benchmark, case, n):
    sides = (bound if case.startswith("bound") else sides_of)(*CASES[case], n)
    times = {name: [] for name in sides}
    with torch.inference_mode():
        torch.testing.assert_close(sides["exeunt"](), sides["torch"](), rtol=1e-4, atol=1e-4)
        for _ in range(TURNS):
            for name, call in sides.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append((time.perf_counter() - start) / CALLS)
        benchmark.pedantic(sides["exeunt"], rounds=3)
    benchmark.extra_info.update(
        check=f"{case}, {n} rows" if n > 1 else f"{case}, one row", threads=torch.get_num_threads(),
        sides={name: statistics.median(t) * 1e6 for name, t in times.items()},
    )  # fmt: skip
