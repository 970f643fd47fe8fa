"""What is particular to exit_stats on CUDA, by emulation: schedules, huge vocabularies, indices that nobody checked."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ops, reference
from exeunt.ops import _backend, _exit_stats_call
from op_inputs import make, norm_args

pytestmark = pytest.mark.skipif(not backends.emulated(), reason="needs a build with EXEUNT_EMULATE=ON")


@pytest.fixture
def emulated(monkeypatch):
    backends.patch_cpu(monkeypatch)
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
    hidden, head = make(2, v, 1, torch.float32)
    seeds, target = torch.arange(2), torch.tensor([0, v - 1])
    got = ops.exit_stats(hidden, head, topk=8, seeds=seeds, target=target)
    exact = reference.exit_stats(hidden.double(), head, topk=8, seeds=seeds, target=target)
    for name in ("argmax", "topk_ids", "sample"):
        assert torch.equal(getattr(got, name), getattr(exact, name)), name
    for name in ("top1", "top2", "sumexp", "weighted", "target"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


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
