"""columns, target, topk, sample: what the pass over the head can leave beside its statistics."""

from __future__ import annotations

import pytest
import torch
from scipy import stats as scipy_stats

import backends
from exeunt import ops, reference
from exeunt.ops import PackedHead, _backend
from exeunt.reference.exit_stats import gumbel
from op_inputs import lies_turned, make, norm_args

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("listed", [False, True], ids=["all", "columns"])
@pytest.mark.parametrize("v", [3, 700])
def test_variants_match_the_reference(backend, v, listed, dtype):
    hidden, head = make(11, v, 70, dtype, spread=3.0)
    g = torch.Generator().manual_seed(3)
    asked = dict(
        topk=8, seeds=torch.randint(-(2**62), 2**62, (11,), generator=g), head_bias=torch.randn(v, generator=g),
        columns=torch.randperm(v, generator=g)[: max(2, v // 5)] if listed else None,
        target=None if listed else torch.randint(0, v, (11,), generator=g), temperature=0.7, softcap=20.0,
        **norm_args("rms", 70, dtype),
    )  # fmt: skip
    exact = reference.exit_stats(hidden.double(), head, **asked)
    device = backend == "cuda" or backend in backends.CAPABILITIES
    results = [ops.exit_stats(hidden, each, **asked) for each in ([head] if device else [head, PackedHead(head)])]
    for got in results:  # packed heads are for CPUs
        assert torch.equal(got.argmax, exact.argmax)
        assert torch.equal(got.topk_ids, exact.topk_ids) and torch.equal(got.sample, exact.sample)
        for name in ("top1", "top2", "sumexp", "weighted", "target", "topk_logits"):
            a, b = getattr(got, name), getattr(exact, name)
            assert (a is b is None) or torch.allclose(a.double(), b, rtol=1e-5, atol=2e-5), name
    if device:
        return
    isa = _backend.cpu.isa()
    if dtype == torch.bfloat16 if isa == "amx" else lies_turned(isa, dtype):  # else a packed head rounds differently
        for a, b in zip(*results, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_columns_write_their_own_logits(backend):
    hidden, head = make(5, 90, 33, torch.float32)
    columns = torch.tensor([80, 2, 2, 17])
    out = torch.empty(5, 4)
    got = ops.exit_stats(hidden, head, columns=columns, logits_out=out)
    assert torch.allclose(out, hidden @ head[columns].T, atol=1e-5)
    assert torch.equal(got.argmax, columns[out.argmax(1)])


def test_ties_among_the_largest_go_to_the_lowest_index(backend):
    head = torch.zeros(600, 2)
    head[[5, 300, 599], 0] = 1.0
    got = ops.exit_stats(torch.tensor([[1.0, 0.0]]), head, topk=5)
    assert got.topk_ids.tolist() == [[5, 300, 599, 0, 1]]
    few = ops.exit_stats(torch.tensor([[1.0, 0.0]]), head[:3], topk=5)
    assert few.topk_ids.tolist() == [[0, 1, 2, -1, -1]] and few.topk_logits[0, 3] == -torch.inf


def test_flagged_rows_have_no_candidates(backend):
    hidden, head = make(3, 60, 16, torch.float32)
    hidden[1, 0] = torch.nan
    got = ops.exit_stats(hidden, head, topk=2, seeds=torch.arange(3), target=torch.zeros(3, dtype=torch.int64))
    assert got.topk_ids[1].tolist() == [-1, -1] and got.sample[1] == -1 and torch.isnan(got.target[1])
    assert (got.sample[[0, 2]] >= 0).all() and torch.isfinite(got.target[[0, 2]]).all()


def test_a_draw_depends_on_its_seed_alone(backend):
    hidden, head = make(33, 1000, 48, torch.float32)
    seeds = torch.arange(33) * 7919
    every = ops.exit_stats(hidden, head, seeds=seeds).sample
    for size in (1, 4, 10):
        parts = [
            ops.exit_stats(hidden[i : i + size], head, seeds=seeds[i : i + size]).sample for i in range(0, 33, size)
        ]
        assert torch.equal(torch.cat(parts), every)
    assert not torch.equal(ops.exit_stats(hidden, head, seeds=seeds + 1).sample, every)


def test_draws_follow_the_softmax(backend):
    v, n = 24, 40_000
    z = torch.randn(v, generator=torch.Generator().manual_seed(5)) * 1.5
    draws = ops.exit_stats(torch.ones(n, 1), z[:, None], seeds=torch.arange(n), temperature=0.8).sample
    counts = torch.bincount(draws, minlength=v).double()
    expected = torch.softmax(z.double() / 0.8, 0) * n
    assert scipy_stats.chisquare(counts, expected).pvalue > 1e-3


def test_the_noise_is_gumbel_and_philox():
    noise = gumbel(torch.arange(200), torch.arange(500)).flatten()
    assert scipy_stats.kstest(noise.numpy(), scipy_stats.gumbel_r.cdf).pvalue > 1e-3
    # Philox4x32-10 of counter 0 and key 0 begins with this word (known-answer test of its authors).
    word = torch.exp(-torch.exp(-gumbel(torch.tensor([0]), torch.tensor([0]))))
    assert round((1 - word.item()) * 2**32 - 0.5) == 0x6627E8D5


def test_entropy_is_left_out_on_request(backend):
    hidden, head = make(3, 60, 16, torch.float32)
    whole, lean = ops.exit_stats(hidden, head), ops.exit_stats(hidden, head, entropy=False)
    assert torch.isnan(lean.weighted).all() and torch.equal(lean.sumexp, whole.sumexp)


@pytest.mark.parametrize(
    "asked,error,message",
    [
        (dict(topk=9), ValueError, r"topk must be an integer in 0..8, got 9"),
        (dict(target=torch.zeros(2)), TypeError, "target must be int64, got torch.float32"),
        (dict(target=torch.zeros(2, dtype=torch.int64)), ValueError, r"target must have shape \[3\], got \[2\]"),
        (dict(target=torch.tensor([0, 1, 60])), ValueError, r"target must lie in 0..59, got 0..60"),
        (dict(seeds=torch.zeros(2, dtype=torch.int64)), ValueError, r"seeds must have shape \[3\], got \[2\]"),
        (dict(columns=torch.tensor([60])), ValueError, r"columns must lie in 0..59, got 60..60"),
        (dict(columns=torch.tensor([], dtype=torch.int64)), ValueError, r"columns must have shape \[K\] with K >= 1"),
        (dict(columns=torch.tensor([1]), target=torch.zeros(3, dtype=torch.int64)), ValueError, "exclude one another"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_gets_one_sentence(asked, error, message):
    hidden, head = make(3, 60, 16, torch.float32)
    with pytest.raises(error, match=message):
        ops.exit_stats(hidden, head, **asked)


def test_variants_are_registered():
    hidden, head = make(3, 60, 16, torch.float32)
    target, seeds = torch.tensor([0, 5, 59]), torch.arange(3)
    args = (hidden, head, None, None, None, None, None, None, 1e-6, 1.0, None, 1.0, None, None, None, target, 3, seeds,
            True, None)  # fmt: skip
    torch.library.opcheck(torch.ops.exeunt.exit_stats.default, args)
    compiled = torch.compile(
        lambda h: ops.exit_stats(h, head, target=target, topk=3, seeds=seeds), backend="aot_eager", fullgraph=True
    )
    for a, b in zip(compiled(hidden), ops.exit_stats(hidden, head, target=target, topk=3, seeds=seeds), strict=True):
        assert torch.equal(a, b)
