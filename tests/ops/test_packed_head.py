"""Packed heads: the same values in another order, int8 within its stated error, a changed weight noticed."""

from __future__ import annotations

import pytest
import torch

from exeunt import ops, reference
from exeunt.ops import PackedHead, _backend
from op_inputs import make, norm_args

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 31), (16, 64), (35, 33), (130, 576), (4500, 96), (35, 1100), (40, 2080)]  # wide: tiles beyond L1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v,d", SHAPES)
def test_a_packed_head_gives_the_bits_of_the_weight_as_it_lies(isa, v, d, dtype):
    hidden, head = make(21, v, d, dtype)
    packed = PackedHead(head)
    assert torch.equal(packed.unpack(), head) and packed.shape == (v, d)
    args = norm_args("rms", d, dtype)
    for n in (1, 2, 5, 9, 21):
        for a, b in zip(
            ops.exit_stats(hidden[:n], packed, **args), ops.exit_stats(hidden[:n], head, **args), strict=True
        ):
            assert a is b is None or torch.equal(a, b)


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
    bound = 0.5 * step * values.abs().sum(1) + 4e-6 * (x.abs() @ values.abs().T) + 1e-6
    exact = x @ values.T
    assert ((logits.double() - exact).abs() <= bound).all()
    assert (stats.top1.double() - exact.amax(1)).abs().max() <= bound.max()


def test_int8_rows_keep_their_bits_in_any_batch_and_flag_what_is_not_finite(isa):
    hidden, head = make(40, 700, 130, torch.float32)
    packed = PackedHead(head, torch.int8)
    every = ops.exit_stats(hidden, packed)
    for size in (1, 3, 8):
        parts = [ops.exit_stats(hidden[i : i + size], packed)[:5] for i in range(0, 40, size)]
        for a, b in zip(zip(*parts, strict=True), every[:5], strict=True):
            assert torch.equal(torch.cat(a), b)
    hidden[3, 5], hidden[7, 0], hidden[9] = torch.nan, torch.inf, 0.0
    got = ops.exit_stats(hidden, packed)
    assert got.argmax[[3, 7]].tolist() == [-1, -1] and got.argmax[9] == 0 and got.top1[9] == 0.0
    keep = [i for i in range(40) if i not in (3, 7, 9)]
    assert torch.equal(got.sumexp[keep], every.sumexp[keep])


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
    with pytest.raises(ValueError, match="its weight must be as it was when packed, but it was changed in place since"):
        ops.exit_stats(hidden, packed)


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
    ],
    ids=["shape", "weight", "dtype"],
)
def test_bad_input_gets_one_sentence(weight, dtype, error, message):
    with pytest.raises(error, match=message):
        PackedHead(weight, dtype)


def test_packed_heads_compile():
    hidden, head = make(3, 40, 32, torch.float32)
    packed = PackedHead(head, torch.int8)
    compiled = torch.compile(lambda h: ops.exit_stats(h, packed).top1 * 2, backend="aot_eager")
    assert torch.equal(compiled(hidden), ops.exit_stats(hidden, packed).top1 * 2)
