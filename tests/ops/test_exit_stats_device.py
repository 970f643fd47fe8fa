"""exit_stats and the ops beside it on a CUDA device: graphs, streams, no waiting, tensors in different places."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ops
from op_inputs import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.on_device(), reason="needs a CUDA device and exeunt._cuda"),
]


def on_device(n=5, v=700, d=96, dtype=torch.bfloat16):
    return [t.cuda() for t in make(n, v, d, dtype)]


def assert_same(a, b):
    for x, y in zip(a[:5], b[:5], strict=True):
        assert torch.equal(x, y)


def test_a_captured_graph_follows_its_inputs():
    hidden, head = on_device()
    rows, count = torch.tensor([4, 0, 2], device="cuda"), torch.tensor(3, device="cuda")
    ops.exit_stats(hidden, head, rows=rows, count=count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.exit_stats(hidden, head, rows=rows, count=count)
    for live, picked in ((3, [1, 1, 3]), (2, [0, 4, 0]), (0, [0, 0, 0])):
        hidden.copy_(torch.randn(hidden.shape, device="cuda"))
        rows.copy_(torch.tensor(picked))
        count.fill_(live)
        graph.replay()
        expected = ops.exit_stats(hidden, head, rows=rows)
        assert_same([s[:live] for s in captured[:5]], [s[:live] for s in expected[:5]])
        assert captured.argmax[live:].tolist() == [-1] * (3 - live)


def test_it_never_waits_for_the_device():
    hidden, head = on_device()
    asked = dict(
        rows=torch.tensor([1, 0], device="cuda"), count=torch.tensor(1, device="cuda"), topk=2,
        target=torch.tensor([3, 4], device="cuda"), seeds=torch.arange(2, device="cuda"),
    )  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.exit_stats(hidden, head, **asked)
        ops.exit_stats(hidden, head, columns=asked["target"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_other_ops_never_wait_and_follow_a_graph():
    hidden, head = on_device(n=300)
    narrow, mask = ops.Fp8Head(head), torch.zeros(300, dtype=torch.bool, device="cuda")

    def step():
        rows, count, moved = ops.compact(mask, hidden)
        back = ops.expand(rows, count, moved, torch.zeros_like(hidden))
        classes = ops.small_head(moved, head[:3], norm="rms")
        return rows, count, back, classes, ops.saturation(moved, hidden), ops.exit_stats(moved, narrow, count=count)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, count, back, classes, cosine, stats = step()
    for share in (0.0, 0.3, 1.0):
        mask.copy_(torch.rand(300) < share)
        graph.replay()
        order = (~mask.cpu()).argsort(stable=True)
        live = int(mask.sum())
        assert rows.tolist() == order.tolist() and int(count) == live
        assert torch.equal(back, torch.where(mask[:, None], hidden, 0))
        torch.testing.assert_close(cosine, torch.cosine_similarity(hidden[rows].float(), hidden.float()))
        assert torch.equal(classes, ops.small_head(hidden[rows], head[:3], norm="rms"))
        want = ops.exit_stats(hidden[rows], narrow)
        assert torch.equal(stats.top1[:live], want.top1[:live]) and (stats.argmax[live:] == -1).all()


def test_it_runs_on_the_current_stream():
    hidden, head = on_device()
    expected = ops.exit_stats(hidden, head)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = hidden + 0
        got = ops.exit_stats(late, head)
    stream.synchronize()
    assert_same(got, expected)


def test_tensors_in_different_places_get_one_sentence():
    hidden, head = on_device()
    with pytest.raises(ValueError, match="head must be on cuda:0 like hidden, got cpu"):
        ops.exit_stats(hidden, head.cpu())
    with pytest.raises(ValueError, match="rows must be on cuda:0 like hidden, got cpu"):
        ops.exit_stats(hidden, head, rows=torch.tensor([0]))
