"""The sides of benchmarks/bench_cuda_attach.py on a tiny model without a GPU: they run what they say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmark's model is a transformers model")

import bench_cuda_attach as bench
import exeunt
import graphs_on_cpu

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=97)  # fmt: skip


@pytest.mark.parametrize("graphs", [False, True])
def test_all_rows_leave_half_way(graphs, monkeypatch):
    graphs_on_cpu.on(monkeypatch)
    model = bench.make("cpu", torch.float32, exeunt.register_attention(), **TINY)
    with bench.attached(model, 3, graphs, length=5) as (step, report):
        for _ in range(4):
            assert step().shape == (3, 1, 97)
        assert report().layers_per_token == 3 and report().fill_ins == 4 * 3 * 3
        assert report().graphs["replayed"] == (3 if graphs else 0)


def test_bytes():
    model = bench.make("cpu", torch.bfloat16, "sdpa", **TINY)
    weights = sum(p.numel() for p in model.model.layers.parameters()) * 2
    head, seen = 97 * 32 * 2, 2 * 3 * 16 * 10 * 2
    assert bench.read(model, 3, 10, 6) == head + weights + 6 * seen
    skipped = 3 * 2 * 32 * 16 * 2
    assert bench.read(model, 3, 10, 3) == head + weights // 2 + 3 * seen + skipped
