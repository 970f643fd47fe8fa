"""Packed heads: the same values in another order, int8 within its stated error, a changed weight noticed."""

from __future__ import annotations

import pytest
import torch

from exeunt import ops, reference
from exeunt.ops import PackedHead, _backend
from op_inputs import lies_turned, make, norm_args

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 31), (16, 64), (35, 33), (130, 576), (4500, 96), (35, 1100), (40, 2080)]  # wide: tiles beyond L1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v,d", SHAPES)
def test_a_packed_head_gives_the_statistics_of_the_weight_as_it_lies(isa, v, d, dtype):
    hidden, head = make(100, v, d, dtype)
    packed = PackedHead(head)
    assert torch.equal(packed.unpack(), head) and packed.shape == (v, d)
    if isa == "amx" and dtype != torch.bfloat16:
        return  # in parts: the tests of parts below
    args = norm_args("rms", d, dtype)
    every, every_lying = (ops.exit_stats(hidden, each, **args) for each in (packed, head))
    for n in (1, 2, 3, 5, 9, 21, 33, 64, 100):
        lying = ops.exit_stats(hidden[:n], head, **args)
        results = ops.exit_stats(hidden[:n], packed, **args), lying, every, every_lying
        for a, b, of_all, of_all_lying in zip(*results, strict=True):
            if a is None:
                continue
            assert torch.equal(a, of_all[:n]) and torch.equal(b, of_all_lying[:n])
            if isa == "amx" or lies_turned(isa, dtype):
                assert torch.equal(a, b)
            else:
                assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=2e-5)


def logits_of(hidden, head, **args):
    """The statistics and, in float64, the logits of a head."""
    logits = torch.empty(len(hidden), head.shape[0])
    stats = ops.exit_stats(hidden, head, logits_out=logits, **args)
    return stats, logits.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("v,d", SHAPES)
def test_floats_in_parts_are_as_exact_as_float32_and_keep_their_bits_in_any_batch(isa, v, d, dtype):
    hidden, head = make(130, v, d, dtype)
    packed = PackedHead(head)
    every, logits = logits_of(hidden, packed)
    exact = hidden.double() @ head.double().T
    size = hidden.double().abs() @ head.double().abs().T
    assert ((logits - exact).abs() <= 4e-7 * size + 1e-30).all()
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 48, 64, 65):
        stats, some = logits_of(hidden[:n], packed)
        assert torch.equal(some, logits[:n])
        for a, b in zip(stats[:5], every[:5], strict=True):
            assert torch.equal(a, b[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 20, 40])
def test_numbers_that_are_no_sum_of_parts(isa, n, dtype):
    """Infinities, NaN, the largest and the smallest numbers: what a float32 product gives, and nothing else changes."""
    hidden, head = make(n, 70, 96, dtype, spread=0.5)
    _, plain = logits_of(hidden, PackedHead(head))
    limits = torch.finfo(dtype)
    head[3, 7], head[20, 0], head[33, 95] = torch.inf, torch.nan, -torch.inf
    head[40], head[41, 5], head[42] = 0.0, limits.max / 64, limits.tiny
    hidden[0, 5] = 0.5
    packed = PackedHead(head)
    stats, logits = logits_of(hidden, packed)
    exact = hidden.double() @ head.double().T
    close = (logits - exact).abs() <= 2e-6 * (hidden.double().abs() @ head.double().abs().T) + 1e-36
    assert (close | ((logits == exact) | (logits.isnan() & exact.isnan()))).all()
    kept = [i for i in range(70) if i not in (3, 20, 33, 40, 41, 42)]
    assert torch.equal(logits[1:, kept], plain[1:, kept])
    assert (stats.argmax == -1).all()
    if n > 1:
        head = torch.ones(70, 96, dtype=dtype)
        clean, _ = logits_of(hidden, PackedHead(head))
        hidden[1, 3], hidden[n - 1, 0] = torch.nan, torch.inf
        stats, logits = logits_of(hidden, PackedHead(head))
        assert stats.argmax[[1, n - 1]].tolist() == [-1, -1]
        assert logits[1].isnan().all() and (logits[n - 1] == torch.inf).all()
        others = [i for i in range(n) if i not in (1, n - 1)]
        assert torch.equal(stats.sumexp[others], clean.sumexp[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v,d", SHAPES)
def test_int8_adds_the_rounding_of_the_weight_and_little_else(isa, v, d, dtype):
    hidden, head = make(9, v, d, dtype, spread=3.0)
    packed = PackedHead(head, torch.int8)
    values = packed.unpack().double()
    half_step = head.double().abs().amax(1) / 254
    assert ((values - head.double()).abs() <= half_step[:, None] * (1 + 1e-5) + 1e-30).all()
    logits = torch.empty(9, v)
    stats = ops.exit_stats(hidden, packed, logits_out=logits)
    # A hidden element is within half a step of its 15-bit grid; the rest is float32 rounding.
    x = hidden.double()
    step = x.abs().amax(1, keepdim=True) / (127 * 128)
    bound = 0.5 * step * values.abs().sum(1) + 6e-7 * (x.abs() @ values.abs().T) + 1e-30
    exact = x @ values.T
    assert ((logits.double() - exact).abs() <= bound).all()
    assert (stats.top1.double() - exact.amax(1)).abs().max() <= bound.max()


def test_int8_rows_keep_their_bits_in_any_batch_and_flag_what_is_not_finite(isa):
    hidden, head = make(40, 700, 130, torch.float32)
    packed = PackedHead(head, torch.int8)
    every = ops.exit_stats(hidden, packed)
    for size in (1, 3, 8, 9, 17, 33):
        parts = [ops.exit_stats(hidden[i : i + size], packed)[:5] for i in range(0, 40, size)]
        for a, b in zip(zip(*parts, strict=True), every[:5], strict=True):
            assert torch.equal(torch.cat(a), b)
    hidden[3, 5], hidden[7, 0], hidden[9] = torch.nan, torch.inf, 0.0
    got = ops.exit_stats(hidden, packed)
    assert got.argmax[[3, 7]].tolist() == [-1, -1] and got.argmax[9] == 0 and got.top1[9] == 0.0
    keep = [i for i in range(40) if i not in (3, 7, 9)]
    assert torch.equal(got.sumexp[keep], every.sumexp[keep])


def test_int8_products_that_cancel_are_exact(isa):
    """Hidden rows of one sign and a weight whose sums are small beside its terms: integers are added up as integers."""
    hidden, head = torch.full((3, 4096), 1.0), torch.zeros(20, 4096)
    head[:, 0::2], head[:, 1::2] = 1.0, -1.0
    head[torch.arange(20), torch.arange(20)] = 0.0
    packed = PackedHead(head, torch.int8)
    assert torch.equal(packed.unpack(), head)
    _, logits = logits_of(hidden, packed)
    assert torch.allclose(logits, hidden.double() @ head.double().T, rtol=1e-6)


@pytest.mark.parametrize("strange", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("v", [5, 70])
def test_a_row_of_an_int8_head_that_is_not_finite_flags_all(isa, strange, v):
    hidden, head = make(3, v, 96, torch.float32)
    head[v - 2, 7] = strange
    packed = PackedHead(head, torch.int8)
    assert packed.unpack()[v - 2].isnan().all() and packed.unpack()[: v - 2].isfinite().all()
    assert ops.exit_stats(hidden, packed).argmax.tolist() == [-1, -1, -1]


def test_largest_and_smallest_elements_survive_int8(isa):
    """Extremes of both grids: all products at the end of their range, where integer sums are largest."""
    d = 4096
    head = torch.ones(3, d) * torch.tensor([[1.0], [-1.0], [0.5]])
    hidden = torch.cat([torch.ones(1, d), -torch.ones(1, d), torch.full((1, d), 1e30)])
    logits = torch.empty(3, 3)
    ops.exit_stats(hidden, PackedHead(head, torch.int8), logits_out=logits)
    exact = hidden.double() @ PackedHead(head, torch.int8).unpack().double().T
    assert torch.allclose(logits.double(), exact, rtol=2e-5)


def test_a_float32_row_meets_a_bfloat16_copy(isa):
    hidden, head = make(4, 90, 40, torch.float32)
    packed = PackedHead(head, torch.bfloat16)
    got = ops.exit_stats(hidden, packed, **norm_args("rms", 40, torch.float32))
    exact = reference.exit_stats(hidden.double(), head.bfloat16(), **norm_args("rms", 40, torch.float32))
    assert torch.allclose(got.top1.double(), exact.top1, atol=1e-5) and torch.equal(got.argmax, exact.argmax)


def test_memory_is_stated():
    packed = PackedHead(torch.zeros(1000, 64), torch.int8)
    assert packed.nbytes == 63 * 16 * 64 + 63 * 16 * 4
    assert PackedHead(torch.zeros(1000, 64)).nbytes == 63 * 16 * 64 * 4


def test_a_changed_weight_is_noticed():
    hidden, head = make(2, 20, 16, torch.float32)
    packed = PackedHead(head)
    ops.exit_stats(hidden, packed)
    head.mul_(2)
    with pytest.raises(
        ValueError, match="its weight must be as it was when packed, but it was changed in place or moved"
    ):
        ops.exit_stats(hidden, packed)
    parameter = torch.nn.Parameter(head)
    packed = PackedHead(parameter)
    parameter.data = head.clone()  # as module.to() does; the version stays
    with pytest.raises(ValueError, match="changed in place or moved"):
        ops.exit_stats(hidden, packed)


def test_a_weight_without_a_version_is_packed():
    with torch.inference_mode():
        hidden, head = make(2, 20, 16, torch.float32)
    packed = PackedHead(head)
    assert torch.equal(ops.exit_stats(hidden, packed).argmax, ops.exit_stats(hidden, head).argmax)


@pytest.mark.parametrize(
    "weight,dtype,error,message",
    [
        (torch.zeros(3), None, ValueError, r"weight must have shape \[V, D\] with V, D >= 1, got \[3\]"),
        (
            torch.zeros(3, 2).double(),
            None,
            TypeError,
            "weight must be float32, bfloat16 or float16 on cpu, got torch.fl",
        ),
        (
            torch.zeros(3, 2),
            torch.float64,
            TypeError,
            "dtype must be float32, bfloat16, float16 or int8, got torch.float6",
        ),
        (torch.zeros(1, (1 << 17) + 1), torch.int8, ValueError, "weight must have D <= 131072 for an int8 copy, got"),
    ],
    ids=["shape", "weight", "dtype", "wide"],
)
def test_bad_input_gets_one_sentence(weight, dtype, error, message):
    with pytest.raises(error, match=message):
        PackedHead(weight, dtype)


def test_packed_heads_compile():
    hidden, head = make(3, 40, 32, torch.float32)
    packed = PackedHead(head, torch.int8)
    compiled = torch.compile(lambda h: ops.exit_stats(h, packed).top1 * 2, backend="aot_eager")
    assert torch.equal(compiled(hidden), ops.exit_stats(hidden, packed).top1 * 2)
