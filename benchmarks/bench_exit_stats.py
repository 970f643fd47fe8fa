"""exit_stats beside what a torch user writes, eager and compiled: `pytest benchmarks/bench_exit_stats.py`.

Each group is one shape: the fused op, the torch pipeline (norm, linear, float32 log-softmax, top 2, entropy) and the
same pipeline under torch.compile, on the same tensors, in one process. `python benchmarks/table.py FILE` turns a
`--benchmark-json=FILE` into the table that the README quotes.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import exeunt

SHAPES = [(8192, 384), (49152, 576), (32000, 4096)]  # (V, D): a small LM, SmolLM2-135M, Llama-2-7B
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = [1, 4, 16, 64]


def pipeline(hidden, head, weight):
    """Norm, full logits, float32 log-softmax, the two largest and the entropy: every measure of ExitStats."""
    logits = F.linear(F.rms_norm(hidden, weight.shape, weight, 1e-5), head).float()
    log_p = logits.log_softmax(-1)
    top = log_p.topk(2, -1)
    return top.indices[:, 0], top.values, -(log_p.exp() * log_p).sum(-1)


def fused(hidden, head, weight):
    stats = exeunt.ops.exit_stats(hidden, head, norm="rms", norm_weight=weight, eps=1e-5)
    return stats.argmax, stats.margin, stats.entropy


SIDES = {"exeunt": lambda: fused, "torch": lambda: pipeline, "torch.compile": lambda: torch.compile(pipeline)}


@pytest.fixture(scope="module")
def heads():
    """One head at a time in memory; they are the large tensors."""
    kept = {}

    def make(v, d, dtype):
        if (v, d, dtype) not in kept:
            kept.clear()
            kept[v, d, dtype] = (torch.randn(v, d) / d**0.5).to(dtype)
        return kept[v, d, dtype]

    return make


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v,d", SHAPES)
def test_exit_stats(benchmark, heads, v, d, dtype, n, side):
    head = heads(v, d, DTYPES[dtype])
    hidden, weight = torch.randn(n, d).to(head.dtype), torch.ones(d, dtype=head.dtype)
    call = SIDES[side]()
    benchmark.group = f"{v} x {d} {dtype} N={n}"
    benchmark.extra_info.update(v=v, d=d, dtype=dtype, n=n, side=side, threads=torch.get_num_threads())
    with torch.inference_mode():
        benchmark.pedantic(call, (hidden, head, weight), warmup_rounds=2, rounds=15, iterations=1)
