"""What is particular to the CUDA kernels, by emulation: schedules, huge vocabularies, indices that nobody checked."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ops, reference
from exeunt.ops import _backend, _exit_stats_call
from op_inputs import make, norm_args

pytestmark = pytest.mark.skipif(not backends.emulated(), reason="needs a build with EXEUNT_EMULATE=ON")


@pytest.fixture(params=backends.CAPABILITIES)
def emulated(request, monkeypatch):
    backends.patch_cpu(monkeypatch, request.param)
    return _backend.cpu.module


@pytest.fixture
def unchecked(monkeypatch):
    """Indices reach the kernel as they do on a device, where checking them would wait for it."""
    monkeypatch.setattr(_exit_stats_call, "_within", lambda name, index, bound: index.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_the_schedule(emulated, dtype):
    hidden, head = make(19, 300, 200, dtype)
    asked = dict(topk=3, seeds=torch.arange(19), **norm_args("layer", 200, dtype))
    emulated.set_schedule(0)
    expected = ops.exit_stats(hidden, head, **asked)
    for seed in (1, 2, 3):
        emulated.set_schedule(seed)
        for a, b in zip(ops.exit_stats(hidden, head, **asked), expected, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_a_vocabulary_whose_chunks_hold_several_tiles(emulated):
    v = 2048 * 128 + 129
    dtype = torch.bfloat16 if emulated.compute_capability(0) == 90 else torch.float32
    hidden, head = make(2, v, 8, dtype)
    seeds, target = torch.arange(2), torch.tensor([0, v - 1])
    got = ops.exit_stats(hidden, head, topk=8, seeds=seeds, target=target)
    exact = reference.exit_stats(hidden.double(), head, topk=8, seeds=seeds, target=target)
    for name in ("argmax", "topk_ids", "sample"):
        assert torch.equal(getattr(got, name), getattr(exact, name)), name
    for name in ("top1", "top2", "sumexp", "weighted", "target"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_blocks_of_many_rows(emulated, dtype):
    """Two tiles side by side, an odd number of them, rows that fill no block; long lists take other blocks."""
    hidden, head = make(140, 3 * 128 + 5, 72, dtype)
    every = torch.arange(140)
    asked = dict(target=every, **norm_args("rms", 72, dtype))
    got = ops.exit_stats(hidden, head, seeds=every, **asked)
    exact = reference.exit_stats(hidden.double(), head, **asked)
    torch.testing.assert_close(got.top1.double(), exact.top1, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.weighted.double(), exact.weighted, rtol=1e-3, atol=1e-2)
    listed = ops.exit_stats(hidden, head, seeds=every, topk=8, **asked)
    for a, b in zip(got[:6], listed[:6], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got.sample, listed.sample) and torch.equal(listed.topk_ids[:, 0], got.argmax)


def test_workspace_does_not_grow_with_the_vocabulary(emulated):
    small, large = (emulated.exit_stats_workspace(0, 8, v, 64, 0, False) for v in (262_144, 10_000_000))
    assert large <= small
    assert emulated.exit_stats_workspace(1, 64, 128_256, 4096, 0, False) < 64 * 128_256 * 4 / 10, "a tenth of logits"


def test_row_indices_out_of_range_flag_their_rows(emulated, unchecked):
    hidden, head = make(4, 50, 40, torch.bfloat16)
    out = torch.full((4, 50), 7.0)
    got = ops.exit_stats(hidden, head, rows=torch.tensor([2, 4, -1, 0]), logits_out=out)
    every = ops.exit_stats(hidden, head)
    assert got.argmax[[1, 2]].tolist() == [-1, -1] and torch.isnan(got.top1[[1, 2]]).all()
    assert torch.equal(got.top1[[0, 3]], every.top1[[2, 0]])
    assert (out[[1, 3]] == 7.0).all() and (out[[0, 2]] != 7.0).all()


def test_columns_and_targets_out_of_range_are_not_read(emulated, unchecked):
    hidden, head = make(3, 50, 40, torch.float16)
    for bad in (50, -1):
        assert ops.exit_stats(hidden, head, columns=torch.tensor([3, bad, 7])).argmax.tolist() == [-1] * 3
    got = ops.exit_stats(hidden, head, target=torch.tensor([50, 3, -1]))
    assert torch.isnan(got.target).tolist() == [True, False, True] and (got.argmax >= 0).all()


@pytest.mark.parametrize("count,live", [(-3, 0), (0, 0), (2, 2), (9, 3)])
def test_a_count_beyond_the_rows_is_cut(emulated, count, live):
    hidden, head = make(3, 50, 40, torch.float32)
    got = ops.exit_stats(hidden, head, count=torch.tensor(count))
    assert (got.argmax >= 0).tolist() == [i < live for i in range(3)]


def test_an_error_names_the_op_and_its_shapes(emulated, monkeypatch):
    hidden, head = make(3, 50, 40, torch.float32)
    run = emulated.exit_stats
    monkeypatch.setattr(_backend.cpu, "exit_stats", lambda *args: run(*args[:-1], 7, 0))
    with pytest.raises(RuntimeError, match=r"exit_stats: hidden \[3, 40\], 3 rows .* head \[50, 40\], on cuda:7: .+"):
        ops.exit_stats(hidden, head)


def test_compact_and_expand(emulated, monkeypatch):
    calls = []
    for name in ("compact", "expand"):
        run = getattr(_backend.cpu, name)
        monkeypatch.setattr(_backend.cpu, name, lambda *a, run=run, name=name: (calls.append(name), run(*a)))
    for n, share in ((1, 1.0), (5, 0.0), (127, 0.5), (129, 0.9), (700, 0.3), (700, 1.0)):
        g = torch.Generator().manual_seed(n)
        mask = (torch.rand(2 * n, generator=g) < share)[::2]
        tensors = torch.rand(n, generator=g), torch.rand(n, 2, 4, generator=g), torch.rand(n, 3).bfloat16()
        rows, count, *moved = ops.compact(mask, *tensors)
        want_rows, want_count, *want = reference.compact(mask, *tensors)
        assert torch.equal(rows, want_rows) and torch.equal(count, want_count) and count.shape == ()
        for a, b in zip(moved, want, strict=True):
            assert torch.equal(a, b)
            into = torch.zeros_like(a)
            assert torch.equal(ops.expand(rows, count, a, into), reference.expand(rows, count, a, into))
            assert not into.any()
    assert calls == ["compact", "expand", "expand", "expand"] * 6


def test_errors_of_the_other_ops_name_them(emulated, monkeypatch):
    x, mask = torch.zeros(3, 40), torch.ones(3, dtype=torch.bool)
    run = emulated
    with pytest.raises(RuntimeError, match=r"saturation: hidden and previous \[3, 40\], on cuda:7: .+"):
        run.saturation(x.data_ptr(), 0, 40, x.data_ptr(), 0, 40, 3, 40, x.data_ptr(), 7, 0)
    with pytest.raises(RuntimeError, match=r"compact: mask \[3\], on cuda:7: .+"):
        run.compact(mask.data_ptr(), 1, 3, x.data_ptr(), x.data_ptr(), 7, 0)
    with pytest.raises(RuntimeError, match=r"expand: 3 rows of 160 bytes, on cuda:7: .+"):
        run.expand(*(x.data_ptr(),) * 5, 3, 160, 7, 0)
    small_head = run.small_head
    monkeypatch.setattr(_backend.cpu, "small_head", lambda *args: small_head(*args[:-1], x.data_ptr(), 7, 0))
    with pytest.raises(RuntimeError, match=r"small_head: hidden \[3, 40\], weight \[2, 40\], on cuda:7: .+"):
        ops.small_head(x, torch.zeros(2, 40))


NO_KERNEL_IMAGE = 209


@pytest.mark.parametrize("op", ["exit_stats", "small_head", "saturation", "compact", "expand", "kv_fill"])
def test_a_device_without_kernels_is_told_which_ones_there_are(emulated, op):
    x, mask = torch.ones(3, 40), torch.ones(3, dtype=torch.bool)
    every = torch.arange(3)
    weight = torch.ones(1, 4, 40)
    stack = ops.KVStack([ops.KVLayer(weight, weight)])
    cache = ops.KVCache([torch.zeros(3, 1, 1, 4)], [torch.zeros(3, 1, 1, 4)])
    calls = {
        "exit_stats": lambda: ops.exit_stats(x, x),
        "small_head": lambda: ops.small_head(x, x),
        "saturation": lambda: ops.saturation(x, x),
        "compact": lambda: ops.compact(mask),
        "expand": lambda: ops.expand(every, torch.tensor(3), x, x),
        "kv_fill": lambda: ops.kv_fill(x, every * 0, every, every * 0, stack, cache),
    }
    emulated.fail_next_launch(NO_KERNEL_IMAGE)
    with pytest.raises(
        RuntimeError, match=rf"^{op}: .*3.*, on cuda:0: no kernel image .*; this build has kernels for 80 90a"
    ):
        calls[op]()
    emulated.fail_next_launch(1)
    with pytest.raises(RuntimeError, match=rf"^{op}: .*3.*, on cuda:0: an error$"):
        calls[op]()
    calls[op]()


def test_a_kernel_gets_the_current_stream_of_its_own_device(monkeypatch):
    asked = []

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (asked.append(device), Stream())[1])
    assert _backend.place(torch.device("cuda", 3)) == (3, 77)
    assert asked == [torch.device("cuda", 3)]
