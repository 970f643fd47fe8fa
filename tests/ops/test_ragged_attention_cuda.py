"""What is particular to ragged_attention on CUDA, by emulation: schedules, replays, lists that nobody checked."""

from __future__ import annotations

import math

import pytest
import torch

import backends
from exeunt import ops
from exeunt.ops import _backend
from ragged_inputs import DTYPES, assert_close, inputs

pytestmark = pytest.mark.skipif(not backends.emulated(), reason="needs a build with EXEUNT_EMULATE=ON")


@pytest.fixture
def emulated(monkeypatch):
    backends.patch_cpu(monkeypatch)
    return _backend.cpu.module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_schedule(emulated, dtype):
    args, options = inputs(dtype, lengths=(300, 70), queries=(1, 9), heads=8, kv_heads=2, size=64)
    emulated.set_schedule(0)
    expected = ops.ragged_attention(*args, **options)
    for seed in (1, 2, 3):
        emulated.set_schedule(seed)
        assert torch.equal(ops.ragged_attention(*args, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 65, 96, 128, 129, 192, 256])
def test_sizes_of_heads(emulated, size, dtype):
    """Each bucket's edges, one query and several tiles of them, one chunk and several."""
    args, options = inputs(dtype, lengths=(300, 40), queries=(1, 30), heads=6, kv_heads=2, size=size)
    assert_close(ops.ragged_attention(*args, **options), args, options)


@pytest.mark.parametrize("queries", [1, 4, 5, 8, 9, 16, 17, 33])
def test_tiles_of_any_number_of_vectors(emulated, queries):
    """Four heads a group: 1, 2 and 4 fragments, full and not, and several tiles, whose chunks are longer."""
    args, options = inputs(torch.bfloat16, lengths=(600,), queries=(queries,), heads=4, kv_heads=1, size=32)
    assert_close(ops.ragged_attention(*args, **options), args, options)


def test_queries_of_any_strides(emulated):
    args, options = inputs(torch.bfloat16, lengths=(70,), queries=(3,), heads=4, kv_heads=2, size=64)
    for wide in (torch.zeros(3, 4, 65), torch.zeros(4, 3, 64).transpose(0, 1)):
        q = wide.bfloat16()[..., :64].copy_(args[0])
        assert torch.equal(ops.ragged_attention(q, *args[1:], **options), ops.ragged_attention(*args, **options))


def flagged(**changed):
    """Which entries of four are NaN where these lists say something that nobody has checked."""
    args, options = inputs(torch.bfloat16, lengths=(70, 300, 9, 40), queries=(1, 2, 1, 3), start=(0, 5, 0, 0))
    names = ["q", "k_cache", "v_cache", "q_indptr", "rows", "kv_len"]
    call = dict(zip(names, args, strict=True)) | options
    for name, (at, value) in changed.items():
        call[name] = call[name].clone()
        call[name][at] = value
    out = ops.ragged_attention(**call)
    seen = [out[a:b].isnan() for a, b in ((0, 1), (1, 3), (3, 4), (4, 7))]
    assert all(entry.all() or not entry.any() for entry in seen)
    return [r for r in range(4) if seen[r].any()]


def test_lists_that_name_what_is_not_there_flag_their_entries(emulated):
    assert flagged() == []
    assert flagged(rows=(1, 6)) == [1] and flagged(rows=(3, -1)) == [3] and flagged(rows=(0, 2**40)) == [0]
    assert flagged(kv_len=(1, 304)) == [1] and flagged(kv_len=(2, -1)) == [2] and flagged(kv_len=(0, 2**40)) == [0]
    assert flagged(kv_start=(1, -1)) == [1] and flagged(kv_start=(2, 10)) == [2]
    assert flagged(q_indptr=(2, 5)) == [0, 1, 2, 3] and flagged(q_indptr=(4, 8)) == [0, 1, 2, 3]
    assert flagged(q_indptr=(0, 1)) == [0, 1, 2, 3]


def test_a_short_bias_flags_the_rows_that_it_does_not_reach(emulated):
    args, _ = inputs(lengths=(70, 40), queries=(1, 1))
    out = ops.ragged_attention(*args, bias=torch.zeros(2, 4, 50))
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
def test_a_page_that_is_not_there_flags_who_sees_it(emulated, bad):
    args, options = inputs(torch.float16, lengths=(70, 40), queries=(2, 1), page=16, window=20)
    pages = options["pages"]
    pages[0, 0] = pages[1, 3] = bad  # before the window, past the last key
    assert_close(ops.ragged_attention(*args, **options), args, options | {"pages": pages.clamp(0, 11)})
    pages[0, 3] = bad
    out = ops.ragged_attention(*args, **options)
    assert out[:2].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize("count,live", [(-1, 0), (7, 2)])
def test_a_count_beyond_the_entries_is_cut(emulated, count, live):
    args, _ = inputs(lengths=(70, 40), queries=(1, 1))
    out = ops.ragged_attention(*args, count=torch.tensor(count))
    assert torch.equal(out[:live], ops.ragged_attention(*args)[:live]) and not out[live:].any()


def test_workspace_follows_the_shapes_alone(emulated):
    """Small beside the cache: 64 rows of 8192 keys, 8 heads of 128 in bfloat16 take 2.1 GB."""
    need = emulated.ragged_attention_workspace(64, 32, 8, 64, 8192, 128)
    assert need < 0.02 * 64 * 8192 * 8 * 256 * 2
    assert need < emulated.ragged_attention_workspace(64, 32, 8, 64, 16384, 128) < 2.1 * need


def test_an_error_names_the_op_and_its_shapes(emulated):
    args, _ = inputs(lengths=(9,), queries=(1,), size=300)
    with pytest.raises(RuntimeError, match=r"ragged_attention: 1 queries of 1 entries, heads \[4, 300\] .*at most 256"):
        ops.ragged_attention(*args)


def test_nothing_to_see_is_zero_not_nan(emulated):
    args, options = inputs(lengths=(0, 9), queries=(2, 1))
    args[1].fill_(math.nan), args[2].fill_(math.nan)
    assert not ops.ragged_attention(*args, **options)[:2].any()
