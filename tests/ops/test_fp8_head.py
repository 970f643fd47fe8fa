"""Heads in 8-bit floating point: the copy itself, and exit_stats with it."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ExitStats, ops, reference
from exeunt.ops import _backend
from exeunt.reference.exit_stats import normalised
from op_inputs import make, norm_args

EVERY = (torch.arange(256, dtype=torch.uint8)).view(torch.float8_e4m3fn)  # every number of the format
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def emulated(monkeypatch):
    if not backends.emulated():
        pytest.skip("needs a build with EXEUNT_EMULATE=ON")
    backends.patch_cpu(monkeypatch)


def truth(hidden, head, **norm):
    """Float64 statistics, of rows rounded to their own dtype."""
    args = (norm.get(name) for name in ("norm", "norm_weight", "norm_bias"))
    x = normalised(hidden.double(), *args, norm.get("eps", 0.0), hidden.dtype)
    return ExitStats.from_logits(x @ head.unpack().double().T)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_copy_is_close_to_the_weight(dtype):
    weight = (torch.randn(70, 33) * torch.logspace(-3, 3, 70)[:, None]).to(dtype)
    weight[5] = 0
    head = ops.Fp8Head(weight)
    bound = weight.float().abs() / 16 + weight.float().abs().amax(1, keepdim=True) / 2**18
    assert ((head.unpack() - weight.float()).abs() <= bound + 1e-38).all()
    assert head.data.stride(0) % 16 == 0 and head.nbytes == 70 * 48 + 70 * 4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n,v,d", [(1, 300, 72), (5, 129, 31), (17, 130, 200), (40, 260, 128)])
@pytest.mark.parametrize("kind", [None, "rms"])
def test_statistics_match_the_reference(emulated, n, v, d, kind, dtype):
    hidden, weight = make(n, v, d, dtype)
    head, norm = ops.Fp8Head(weight), norm_args(kind, d, dtype)
    out = torch.empty(n, v)
    got, exact = ops.exit_stats(hidden, head, logits_out=out, **norm), truth(hidden, head, **norm)
    for name in ("top1", "top2", "sumexp", "weighted"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(out.argmax(1), got.argmax)
    alone = ops.exit_stats(hidden[-1:], head, **norm)
    assert all(torch.equal(a[-1:], b) for a, b in zip(got[:5], alone[:5], strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_widened_exactly(emulated, dtype):
    finite = EVERY[~EVERY.float().isnan()]
    head = ops.Fp8Head(torch.ones(len(finite), 20))
    for place in range(20):
        head.data.zero_()
        head.data[:, place], head.scale[:] = finite, 1.0
        out = torch.empty(1, len(finite))
        ops.exit_stats(torch.eye(20, dtype=dtype)[place : place + 1], head, logits_out=out)
        assert torch.equal(out[0], finite.float())
    for code in (0x7F, 0xFF):
        head.data[3, 7] = EVERY[code]
        assert ops.exit_stats(torch.ones(2, 20, dtype=dtype), head).argmax.tolist() == [-1, -1]


def test_rows_that_are_not_finite_flag_what_meets_them(emulated):
    for bad in (torch.nan, torch.inf):
        weight = torch.randn(9, 20)
        weight[4, 3] = bad
        assert ops.exit_stats(torch.randn(3, 20).bfloat16(), ops.Fp8Head(weight)).argmax.tolist() == [-1] * 3


def test_an_unaligned_copy_and_columns(emulated):
    hidden, weight = make(3, 50, 40, torch.bfloat16)
    head = ops.Fp8Head(weight)
    columns = torch.tensor([7, 0, 49])
    some, every = (ops.exit_stats(hidden, head, columns=c) for c in (columns, torch.arange(50)))
    assert torch.equal(every.top1, ops.exit_stats(hidden, head).top1)
    assert torch.isin(some.argmax, columns).all()
    head.data = torch.empty(50 * 41 + 1, dtype=torch.uint8)[1:].view(torch.float8_e4m3fn).view(50, 41)[:, :40]
    head.data.copy_(ops.Fp8Head(weight).data)
    for a, b in zip(ops.exit_stats(hidden, head)[:5], every[:5], strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
def test_where_there_is_no_kernel_the_reference_serves():
    hidden, weight = make(3, 50, 40, torch.bfloat16)
    head = ops.Fp8Head(weight)
    got, want = ops.exit_stats(hidden, head), reference.exit_stats(hidden, head.unpack())
    assert torch.equal(got.argmax, want.argmax) and torch.equal(got.top1, want.top1)


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match=r"Fp8Head: weight must have shape \[V, D\] with V, D >= 1, got \[0, 4\]"):
        ops.Fp8Head(torch.zeros(0, 4))
    with pytest.raises(TypeError, match="Fp8Head: weight must be float32, bfloat16 or float16, got torch.float64"):
        ops.Fp8Head(torch.zeros(2, 4).double())
    with pytest.raises(TypeError, match="hidden must be bfloat16 or float16 beside an Fp8Head, got torch.float32"):
        ops.exit_stats(torch.zeros(1, 4), ops.Fp8Head(torch.ones(2, 4)))
