"""The step that benchmarks/bench_cuda_step.py captures in graphs, without graphs: what it computes is right."""

from __future__ import annotations

import pytest
import torch

import backends
import bench_cuda_step as bench

SHAPE = bench.Shape(layers=6, width=32, heads=4, kv_heads=2, head_size=8, inner=40, vocab=90, length=7, batch=5,
                    exits=(2, 3, 5))  # fmt: skip


@pytest.mark.parametrize("leaves", [[6, 6, 6, 6, 6], [2, 6, 3, 2, 5], [2, 2, 2, 2, 2], [5, 3, 3, 5, 5]], ids=str)
@pytest.mark.parametrize("kernels", ["cpu", *(backends.CAPABILITIES if backends.emulated() else [])])
def test_rows_leave_with_their_own_tokens_and_caches(leaves, kernels, monkeypatch):
    torch.manual_seed(1)
    decoder = bench.Decoder(SHAPE, "cpu", torch.float32)
    decoder.leaves.copy_(torch.tensor(leaves))
    if kernels != "cpu":
        backends.patch_cpu(monkeypatch, kernels)
    bench.check(decoder)
    entered = bench.step(decoder)
    stops = [0, *SHAPE.exits]
    expected = [sum(e > stop for e in leaves) for stop in stops]
    assert entered == expected[: len(entered)] and not any(expected[len(entered) :])


def test_a_row_that_keeps_nothing_of_its_own_is_noticed():
    torch.manual_seed(1)
    decoder = bench.Decoder(SHAPE, "cpu", torch.float32)
    decoder.leaves.copy_(torch.tensor([2, 6, 3, 2, 5]))
    decoder.fill = lambda *args: None
    with pytest.raises(AssertionError):
        bench.check(decoder)


def test_buckets_end_with_the_batch():
    assert bench.buckets(1) == [1] and bench.buckets(5) == [1, 2, 4, 5] and bench.buckets(16) == [1, 2, 4, 8, 16]
