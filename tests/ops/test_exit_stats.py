"""The fused check against its float64 reference, on every ISA path of the machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from exeunt import ExitStats, ops, reference
from exeunt.ops import _backend
from exeunt.reference.exit_stats import normalised
from op_inputs import make, norm_args

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
INF, NAN = math.inf, math.nan


def torch_pipeline(hidden, head, **kw):
    """What a torch user writes: norm, linear in the model's dtype, then float32 statistics of the logits."""
    x = hidden
    if kw.get("norm") == "rms":
        x = F.rms_norm(x, x.shape[1:], kw.get("norm_weight"), kw["eps"])
    elif kw.get("norm") == "layer":
        x = F.layer_norm(x, x.shape[1:], kw.get("norm_weight"), kw.get("norm_bias"), kw["eps"])
    z = F.linear(x, head, kw.get("head_bias")).float() * kw.get("scale", 1.0)
    if kw.get("softcap"):
        z = kw["softcap"] * torch.tanh(z / kw["softcap"])
    return ExitStats.from_logits(z / kw.get("temperature", 1.0))


def assert_within_contract(hidden, head, **kw):
    """Contract 6: at most twice torch's own error plus 4 ulp of the largest partial sum, per statistic."""
    expected = truth(hidden, head, **kw)
    got = ops.exit_stats(hidden, head, **kw)
    assert_close_to(got, expected, hidden.shape[1])
    return got, expected[0]


def truth(hidden, head, **kw):
    """Float64 statistics, those of the torch pipeline, and 4 ulp of the largest partial sum of a logit."""
    exact = reference.exit_stats(hidden.double(), head, **kw)
    # The largest partial sum of a logit is bounded by the sum of |w x|; that of a statistic by sumexp and weighted.
    norm = (kw.get(name) for name in ("norm", "norm_weight", "norm_bias"))
    x = normalised(hidden.double(), *norm, kw.get("eps", 0.0), head.dtype)
    terms = (x.abs() @ head.double().abs().T).max().item() * abs(kw.get("scale", 1.0)) / kw.get("temperature", 1.0)
    slack = 4 * torch.finfo(torch.float32).eps * max(terms, float(exact.top1.abs().max()), 1.0)
    return exact, torch_pipeline(hidden, head, **kw), slack


def assert_close_to(got, expected, d):
    exact, peer, slack = expected
    for name in ("top1", "top2", "sumexp", "weighted"):
        a, r, t = (getattr(s, name).double() for s in (got, exact, peer))
        # an error of the logits moves the sums by as much times their size
        size = 1.0 if name.startswith("top") else float(exact.sumexp.max() + exact.weighted.abs().max())
        error = (a - r).abs().nan_to_num(0.0).max().item()
        torch_error = (t - r).abs().nan_to_num(0.0).max().item()
        assert error <= 2 * torch_error + slack * size, (
            f"{name}: {error:.2e} > 2 x {torch_error:.2e} + {slack * size:.2e}"
        )
    # The argmax may differ only where the two candidates are closer than rounding can tell.
    other = (got.argmax != exact.argmax).nonzero().flatten()
    for i in other.tolist():
        assert float(exact.top1[i] - exact.top2[i]) <= 2 * slack + torch.finfo(torch.float32).eps * d


SMALL = [(n, v, d) for n in (0, 1, 3, 17) for v in (2, 3, 35) for d in (31, 576)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("n,v,d", [*SMALL, (1, 1, 1), (5, 7, 1), (65, 130, 33), (130, 515, 64)])
def test_small_heads_match_the_reference(backend, n, v, d, kind, dtype):
    hidden, head = make(n, v, d, dtype)
    got, exact = ops.exit_stats(hidden, head, **norm_args(kind, d, dtype)), None
    if n:
        got, exact = assert_within_contract(hidden, head, **norm_args(kind, d, dtype))
    assert got.argmax.shape == (n,) and got.argmax.dtype == torch.int64
    assert all(s.shape == (n,) and s.dtype == torch.float32 for s in got[1:5])
    assert exact is None or torch.equal(got.argmax, exact.argmax) or v > 35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v,d", [(49152, 31), (49152, 576), (50257, 768), (35, 4096)])
@pytest.mark.parametrize("n", [1, 3, 17])
def test_large_heads_match_the_reference(isas, n, v, d, dtype):
    hidden, head = make(n, v, d, dtype, spread=4.0)
    expected = truth(hidden, head, **norm_args("rms", d, dtype))
    for _ in isas:  # what is expected takes longer than what is tested
        assert_close_to(ops.exit_stats(hidden, head, **norm_args("rms", d, dtype)), expected, d)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v", [49152, 50257])
def test_wide_and_tall_heads_match_the_reference(isas, v, dtype):
    hidden, head = make(17, v, 4096, dtype, spread=4.0)
    expected = truth(hidden, head, **norm_args("rms", 4096, dtype))
    for _ in isas:
        assert_close_to(ops.exit_stats(hidden, head, **norm_args("rms", 4096, dtype)), expected, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "tail",
    [
        dict(scale=0.25),
        dict(scale=-2.0),
        dict(softcap=3.0),
        dict(temperature=0.7),
        dict(scale=1.5, softcap=30.0, temperature=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_what_the_model_does_to_a_logit(backend, tail, with_bias, dtype):
    hidden, head = make(6, 300, 77, dtype, spread=5.0)
    bias = torch.linspace(-3, 3, 300).to(dtype) if with_bias else None
    assert_within_contract(hidden, head, head_bias=bias, **norm_args("layer", 77, dtype), **tail)


@pytest.mark.parametrize("parameter", ["head_bias", "norm_weight", "norm_bias"])
def test_float32_parameters_beside_a_bfloat16_head(backend, parameter):
    hidden, head = make(4, 50, 40, torch.bfloat16)
    args = dict(
        norm="layer", norm_weight=torch.ones(40), norm_bias=torch.zeros(40), head_bias=torch.zeros(50), eps=1e-5
    )
    args[parameter] = torch.randn(args[parameter].shape)
    got = ops.exit_stats(hidden, head, **args)
    exact = reference.exit_stats(hidden.double(), head, **args)
    torch.testing.assert_close(got.top1.double(), exact.top1, rtol=1e-5, atol=1e-5)


def test_non_contiguous_rows(backend):
    base_h, base_w = make(16, 90, 128, torch.float32)
    hidden, head = base_h[::3, 5:69], base_w[::2, 7:71]
    assert_within_contract(hidden, head)
    transposed = torch.randn(64, 6).T
    assert_within_contract(transposed, head)
    hidden3 = torch.randn(4, 5, 64)[:, -1]  # the last token of a batch, as a model's output is sliced
    assert_within_contract(hidden3, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vectors_of_any_stride(backend, dtype):
    hidden, head = make(5, 50, 300, dtype)
    options = norm_args("layer", 300, dtype) | {"head_bias": torch.randn(50)}
    apart = {k: v.repeat_interleave(3)[::3] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert apart["norm_weight"].stride() == apart["norm_bias"].stride() == apart["head_bias"].stride() == (3,)
    for one, other in zip(ops.exit_stats(hidden, head, **options), ops.exit_stats(hidden, head, **apart), strict=True):
        assert (one is other is None) or torch.equal(one, other)
    repeated = ops.exit_stats(hidden, head, norm="rms", norm_weight=torch.tensor(1.25).expand(300))
    assert torch.equal(
        repeated.top1, ops.exit_stats(hidden, head, norm="rms", norm_weight=torch.full((300,), 1.25)).top1
    )


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def logits_as_rows(z):
    """hidden, head whose product is exactly the given logits [N, V]."""
    return z.contiguous(), torch.eye(z.shape[1])


@pytest.mark.parametrize("scale", [1.0, 80.0, 1e4, 3e37], ids=str)
def test_logits_that_over_and_underflow(backend, scale):
    z = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, -1.0], [-1.0, -0.9, -0.8, -1.0]]) * scale
    got = ops.exit_stats(z, torch.eye(4))
    exact = ExitStats.from_logits(z.double())
    torch.testing.assert_close(got.top1.double(), exact.top1)
    torch.testing.assert_close(got.max_prob.double(), exact.max_prob, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.margin.double(), exact.margin, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got.entropy).all()


@pytest.mark.parametrize("step", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("order", ["rising", "falling", "one spike"])
def test_logits_that_leave_what_their_sums_are_relative_to(backend, order, step):
    """Within a chunk each group's logits may exceed all before by any amount, or only one of them does."""
    z = torch.arange(300.0) * step
    if order == "falling":
        z = -z
    elif order == "one spike":
        z = torch.linspace(-step, step, 300)
        z[217] = 50 * step
    hidden = torch.tensor([[1.0], [-1.0], [0.5]])
    got, exact = ops.exit_stats(hidden, z[:, None]), reference.exit_stats(hidden.double(), z[:, None])
    assert torch.equal(got.argmax, exact.argmax)
    for name in ("top1", "top2", "sumexp", "weighted"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=2e-5, atol=1e-6, msg=name)


def test_hidden_whose_squares_overflow(backend):
    hidden, head = make(3, 20, 64, torch.float32)
    assert_within_contract(hidden * 1e25, head, **norm_args("rms", 64, torch.float32))
    assert_within_contract(hidden * 1e-25, head, **norm_args("rms", 64, torch.float32))


@pytest.mark.parametrize("v", [2, 16, 17, 35, 130, 1000, 70000])
def test_ties_go_to_the_lowest_index(backend, v):
    z = torch.zeros(3, v)
    z[1, [v // 2, v - 1]] = 2.0
    z[2, v - 1] = 2.0
    head = torch.zeros(v, 3)
    head[:, :] = z.T
    got = ops.exit_stats(torch.eye(3), head)
    assert got.argmax.tolist() == [0, v // 2, v - 1]
    assert got.top1.tolist() == [0.0, 2.0, 2.0]
    assert got.top2.tolist() == [0.0, 2.0 if v // 2 != v - 1 else 0.0, 0.0]


def test_a_vocabulary_of_one(backend):
    got = ops.exit_stats(torch.ones(2, 3), torch.ones(1, 3))
    assert got.argmax.tolist() == [0, 0]
    assert got.top2.tolist() == [-INF, -INF]
    assert got.max_prob.tolist() == got.margin.tolist() == [1.0, 1.0]
    assert got.entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("v", [3, 40, 300])
def test_rows_with_nan_or_inf_are_flagged_and_others_unaffected(backend, bad, v):
    z = torch.randn(5, v)
    clean = ops.exit_stats(*logits_as_rows(z))
    for column in (0, v // 2, v - 1):
        bias = torch.zeros(v)
        bias[column] = bad
        got = ops.exit_stats(*logits_as_rows(z), head_bias=bias)
        assert got.argmax.tolist() == [-1] * 5
        assert all(torch.isnan(s).all() for s in got[1:5])
    hidden = z.clone()
    hidden[2, v // 2] = bad
    got = ops.exit_stats(hidden, torch.eye(v))  # row 2 meets bad * 1 and bad * 0 = NaN
    assert got.argmax[2] == -1 and torch.isnan(got.max_prob[2])
    keep = [0, 1, 3, 4]
    for a, b in zip(got[:5], clean[:5], strict=True):
        assert torch.equal(a[keep], b[keep])
    assert not (got.max_prob >= 0.0)[2] and not (got.margin >= 0.0)[2] and not (-got.entropy >= -INF)[2]


@pytest.mark.parametrize("tail", [dict(softcap=30.0), dict(softcap=3.0, scale=-2.0, temperature=0.7)], ids=str)
@pytest.mark.parametrize("v", [3, 300])
def test_a_soft_cap_hides_nothing_infinite(backend, tail, v):
    z = torch.randn(4, v)
    bias = torch.zeros(v)
    bias[v // 2] = math.copysign(INF, tail.get("scale", 1.0))
    for of in (ops, reference):
        assert of.exit_stats(*logits_as_rows(z), head_bias=bias, **tail).argmax.tolist() == [-1] * 4
    without = ops.exit_stats(*logits_as_rows(z), head_bias=-bias, **tail)
    keep = [i for i in range(v) if i != v // 2]
    exact = reference.exit_stats(*logits_as_rows(z[:, keep].double()), **tail)
    torch.testing.assert_close(without.sumexp.double(), exact.sumexp, rtol=1e-5, atol=0.0)
    hidden = z.clone()
    hidden[1, 0] = INF
    got = ops.exit_stats(hidden, torch.eye(v) + 1.0, **tail)  # no zero, so no NaN: all its logits are infinite
    assert (got.argmax == -1).tolist() == [False, True, False, False]


def test_minus_infinity_contributes_nothing(backend):
    z = torch.randn(4, 300)
    bias = torch.zeros(300)
    bias[10:290] = -INF
    got = ops.exit_stats(*logits_as_rows(z), head_bias=bias)
    keep = [*range(10), *range(290, 300)]
    exact = ExitStats.from_logits(z[:, keep].double())
    assert torch.equal(got.argmax, torch.tensor(keep)[exact.argmax])
    torch.testing.assert_close(got.sumexp.double(), exact.sumexp, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-6)
    nothing = ops.exit_stats(*logits_as_rows(z), head_bias=torch.full((300,), -INF))
    assert nothing.argmax.tolist() == [-1] * 4 and torch.isnan(nothing.top1).all()


@pytest.mark.parametrize("banned", [slice(0, 130), slice(10, 290), slice(100, 300)])
def test_words_banned_by_the_least_number(backend, banned):
    """As masks are often made: a bias that leaves the least finite number, in whole groups of words too."""
    z, bias = torch.randn(4, 300), torch.zeros(300)
    bias[banned] = torch.finfo(torch.float32).min
    got, exact = ops.exit_stats(*logits_as_rows(z), head_bias=bias), ExitStats.from_logits((z + bias).double())
    assert torch.equal(got.argmax, exact.argmax)
    torch.testing.assert_close(got.sumexp.double(), exact.sumexp, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v,d", [(2, 331), (515, 33), (49152, 96)])  # with two words threads share out rows
def test_same_bits_for_any_grouping_and_thread_count(backend, v, d, dtype):
    hidden, head = make(70, v, d, dtype, spread=4.0)
    args = norm_args("rms", d, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [ops.exit_stats(hidden[i : i + 1], head, **args) for i in range(70)]
        alone = ExitStats(*(torch.cat(s) for s in zip(*(s[:5] for s in alone), strict=True)))
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for size in (2, 3, 4, 7, 16, 70):
                parts = [ops.exit_stats(hidden[i : i + size], head, **args) for i in range(0, 70, size)]
                for a, b in zip(zip(*(s[:5] for s in parts), strict=True), alone[:5], strict=True):
                    assert torch.equal(torch.cat(a), b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("v,d,times", [(120, 48, 1), (2, 512, 20)])  # of two words threads share out the rows
def test_rows_and_count(backend, two_threads, index_dtype, v, d, times):
    hidden, head = make(9, v, d, torch.float32)
    rows = torch.tensor([7, 0, 3, 3, 8] * times, dtype=index_dtype)
    every = ops.exit_stats(hidden, head)
    got = ops.exit_stats(hidden, head, rows=rows)
    for a, b in zip(got[:5], every[:5], strict=True):
        assert torch.equal(a, b[rows.long()])
    for live in (0, 2, 3 * times, 5 * times):
        got = ops.exit_stats(hidden, head, rows=rows, count=torch.tensor(live, dtype=index_dtype))
        assert torch.equal(got.top1[:live], every.top1[rows.long()][:live])
        assert got.argmax[live:].tolist() == [-1] * (5 * times - live) and torch.isnan(got.sumexp[live:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_logits_out_is_the_raw_product_of_the_live_rows(backend, dtype, out_dtype):
    hidden, head = make(9, 75, 48, dtype)
    bias = torch.randn(75).to(dtype)
    rows = torch.tensor([7, 0, 3])
    buffer = torch.full((9, 80), 123.0, dtype=out_dtype or dtype)
    out = buffer[:, :75]
    ops.exit_stats(
        hidden, head, head_bias=bias, rows=rows, count=torch.tensor([2]), scale=3.0, softcap=2.0, logits_out=out
    )
    exact = F.linear(hidden.double(), head.double(), bias.double())
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(out.dtype, 1e-5)
    torch.testing.assert_close(out[[7, 0]].double(), exact[[7, 0]], rtol=tolerance, atol=tolerance)
    untouched = [i for i in range(9) if i not in (7, 0)]
    assert (out[untouched] == 123.0).all() and (buffer[:, 75:] == 123.0).all()
    if out.dtype != torch.float32:  # rounded to nearest even from the float32 product
        full = torch.empty(9, 75)
        ops.exit_stats(hidden, head, head_bias=bias, logits_out=full)
        assert torch.equal(out[[7, 0]], full.to(out.dtype)[[7, 0]])


def test_peak_memory_does_not_grow_with_the_vocabulary():
    small, large = (_backend.cpu.exit_stats_workspace(0, 0, 8, v, 64, 0, False, 2) for v in (100_000, 10_000_000))
    assert large <= 2 * small


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_resident_memory_of_a_call_is_far_below_its_logits():
    script = """
import pathlib, re, torch, exeunt
head, hidden = (torch.ones(n, 64, dtype=torch.bfloat16) for n in (151_936, 64))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
exeunt.ops.exit_stats(hidden[:1], head[:2])
before = peak()
exeunt.ops.exit_stats(hidden, head)
fused = peak()
torch.nn.functional.linear(hidden, head).float()
print(fused - before, peak() - fused)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fused, logits = (int(kilobytes) for kilobytes in found.stdout.split())
    assert fused < 6_000 and logits > 40_000, "kilobytes; float32 logits alone are 38,000"


def test_an_unknown_limit_of_the_instruction_set_is_one_warning():
    script = "import exeunt; print(exeunt.ops._backend.cpu.isa())"
    env = os.environ | {"EXEUNT_MAX_ISA": "sse9"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert "EXEUNT_MAX_ISA must be baseline, avx2" in found.stderr and "got 'sse9'" in found.stderr
    assert "Traceback" not in found.stderr and f"({found.stdout.strip()}) serves" in found.stderr
