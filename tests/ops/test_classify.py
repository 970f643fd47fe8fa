"""classify and Check against their reference, against policies, and on their own rows in other company."""

from __future__ import annotations

import math

import pytest
import torch

from exeunt import confidence, ops, reference
from exeunt.heads import ExitHead
from exeunt.ops import _backend
from exeunt.policies import At, Evidence, Threshold

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
MEASURES = list(ops.Check.MEASURES)


def inputs(n=9, s=7, d=70, v=3, p=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, s, d, generator=g).to(dtype)
    mask = torch.arange(s) < torch.randint(1, s + 1, (n, 1), generator=g)
    weight, bias = (torch.randn(v, p or d, generator=g) / 3).to(dtype), torch.randn(v, generator=g)
    pooler = {} if p is None else {
        "pooler_weight": (torch.randn(p, d, generator=g) / 6).to(dtype), "pooler_bias": torch.randn(p, generator=g)
    }  # fmt: skip
    return hidden, mask, weight, bias, pooler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [None, 33])
@pytest.mark.parametrize("states", ["first", "mean", "mean of some"])
def test_as_the_reference(isa, states, p, dtype):
    hidden, mask, weight, bias, pooler = inputs(p=p, v=5, dtype=dtype)
    kept = {"mask": mask} if states == "mean of some" else {}
    hidden = hidden[:, 0] if states == "first" else hidden
    logits, stats = ops.classify(hidden, weight, bias, **kept, **pooler)
    exact, exact_stats = reference.classify(hidden.double(), weight, bias, **kept, **pooler)
    step = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert torch.allclose(logits.double(), exact, rtol=step, atol=step)
    own = reference.classify(logits, torch.eye(5))[1]  # statistics of the very logits that came back
    assert torch.equal(stats.argmax, own.argmax) and torch.equal(stats.argmax, exact_stats.argmax)
    for name in ("top1", "top2", "sumexp", "weighted"):
        assert torch.allclose(getattr(stats, name), getattr(own, name), rtol=1e-6, atol=1e-6)


def test_a_row_keeps_its_bits_in_any_batch_padding_and_thread_count(isa):
    hidden, mask, weight, bias, pooler = inputs(n=50, s=40, d=300, p=64)
    alone = []
    for h, m in zip(hidden, mask, strict=True):
        logits, stats = ops.classify(h[None, : int(m.sum())], weight, bias, **pooler)
        alone.append(torch.cat((logits, torch.stack(stats[1:5], 1)), 1))
    hidden = torch.where(mask[..., None], hidden, math.nan)  # padding is not read
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits, stats = ops.classify(hidden, weight, bias, mask=mask, **pooler)
            assert torch.equal(torch.cat((logits, torch.stack(stats[1:5], 1)), 1), torch.cat(alone))
    finally:
        torch.set_num_threads(threads)


def test_strides_empty_batches_and_rows_without_tokens(isa):
    hidden, mask, weight, bias, _ = inputs(n=4, s=6, d=8)
    logits, _ = ops.classify(hidden, weight, bias, mask=mask)
    turned = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.classify(turned, weight, bias, mask=mask.T.contiguous().T)[0], logits)
    assert ops.classify(hidden[:0], weight, bias)[0].shape == (0, 3)
    mask[1] = False
    assert torch.equal(ops.classify(hidden, weight, bias, mask=mask)[0][1], bias)
    hidden[2, 0] = math.nan
    _, stats = ops.classify(hidden, weight, bias)
    assert (stats.argmax == -1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("p", [None, 20])
def test_a_check_decides_as_the_policy_does(isa, name, p):
    hidden, mask, weight, bias, pooler = inputs(n=40, p=p)
    logits, stats = ops.classify(hidden, weight, bias, mask=mask, **pooler)
    measure = confidence.measure(name)
    point = confidence.ExitPoint(logits, logits, ExitHead(), stats, weight.shape[0], logits)
    scores = measure.score(point)
    middle = scores.sort().values
    for threshold in (float(middle[10:12].mean()), float(middle[30:32].mean()), math.inf, measure.low):
        check = ops.Check(weight, bias, **pooler, measure=name, threshold=threshold, tokens=True)
        gone, out = check(hidden, mask)
        expected = Threshold(threshold).step({}, Evidence(scores), At(0, 0, 1))
        assert gone == int(expected.sum())
        assert torch.equal(check.leave(out, 40), expected) and torch.equal(check.logits(out, 40), logits)
    near = ops.Check(weight, bias, **pooler, measure=name, threshold=float(scores[7]), tokens=True)
    assert near(hidden, mask)[0] == -1  # a tie is not for the kernel to break
    hidden[3] = math.nan  # stays, as it does by any policy
    gone, out = check(hidden, mask)
    assert gone == int(expected.sum()) - int(expected[3]) and not check.leave(out, 40)[3]


def test_a_check_reads_the_first_token_and_follows_its_weights():
    hidden, _, weight, bias, _ = inputs()
    check = ops.Check(weight, bias, measure="max_prob", threshold=0.0, tokens=False)
    assert torch.equal(check.logits(check(hidden, None)[1], 9), ops.classify(hidden[:, 0], weight, bias)[0])
    weight.data = weight.data.clone() * 2  # elsewhere, as .to(...) puts it
    assert torch.equal(check.logits(check(hidden, None)[1], 9), ops.classify(hidden[:, 0], weight, bias)[0])
    assert check(hidden.transpose(1, 2).contiguous().transpose(1, 2), None)[0] == -1  # classify makes a copy
    assert check(hidden[..., :5], None)[0] == -1


def test_many_rows_are_shared_out_among_threads(isa):
    hidden, _, weight, bias, _ = inputs(n=700, s=1, d=130, v=35)  # as many as a tagger's batch has tokens, or more
    hidden[5], weight[3] = math.nan, weight[2]  # two labels tie
    check = ops.Check(weight, bias, measure="neg_normalized_entropy", threshold=-0.35, tokens=False)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits, stats = ops.classify(hidden[:, 0], weight, bias)
            gone, out = check(hidden, None)
            found.append((gone, check.leave(out, 700).clone(), check.logits(out, 700).clone(), logits, *stats[:5]))
    finally:
        torch.set_num_threads(threads)
    own = reference.classify(found[0][3], torch.eye(35))[1]
    assert 50 < found[0][0] == int(found[0][1].sum()) < 650 and not found[0][1][5] and own.argmax[5] == -1
    for other in found:
        assert other[0] == found[0][0]
        for a, b in zip(other[1:], found[0][1:], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    for a, b in zip(found[0][4:], own[:5], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "row", [[-math.inf, 2.0, 2.0], [-math.inf] * 3, [math.inf, 0, 0], [0, math.nan, 1], [3e38, -3e38, -math.inf], [5.0]]
)
def test_statistics_of_unusual_rows(isa, row):
    z = torch.tensor([row])
    zeros = torch.zeros(1, 4)
    found = ops.classify(zeros, torch.zeros(len(row), 4), z[0])[1]
    expected = reference.classify(zeros, torch.zeros(len(row), 4), z[0])[1]
    for a, b in zip(found[:5], expected[:5], strict=True):
        assert torch.allclose(a, b, equal_nan=True), (row, found, expected)


def test_texts_without_tokens_have_state_zero(isa):
    _, _, weight, bias, _ = inputs()
    none = torch.empty(4, 0, 70)
    for mask in (None, torch.empty(4, 0, dtype=torch.bool)):
        assert torch.equal(ops.classify(none, weight, bias, mask=mask)[0], bias.expand(4, -1))
        check = ops.Check(weight, bias, measure="margin", threshold=0.2, tokens=True)
        assert torch.equal(check.logits(check(none, mask)[1], 4), bias.expand(4, -1))
    assert ops.Check(weight, bias, measure="margin", threshold=0.2, tokens=False)(none, None)[0] == -1


def test_defaults_of_torch_change_nothing(isa):
    hidden, mask, weight, bias, pooler = inputs(p=12)
    want = ops.classify(hidden, weight, bias, mask=mask, **pooler)
    check = ops.Check(weight, bias, **pooler, measure="margin", threshold=0.2, tokens=True)
    gone = check(hidden, mask)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(ops.classify(hidden, weight, bias, mask=mask, **pooler)[0], want[0])
        assert check(hidden, mask)[0] == gone
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(ops.classify(hidden, weight, bias, mask=mask, **pooler)[0], want[0])


def test_checks_share_a_room():
    hidden, mask, weight, bias, pooler = inputs(p=33)
    wide = ops.Check(weight, bias, **pooler, measure="margin", threshold=0.2, tokens=True)
    plain = ops.Check(weight.new_ones(7, 70), measure="margin", threshold=0.2, tokens=True)
    room = ops.Check.room((wide, plain), hidden)
    gone, out = wide(hidden, mask, room)
    assert out is room
    first = wide.leave(out, 9).clone()
    assert plain(hidden[:4], None, room)[0] == 0  # all labels tie
    late = ops.Check(weight, bias, **pooler, measure="margin", threshold=0.2, tokens=True)
    assert late(hidden, mask, room)[0] == gone  # of others, which need as much
    with pytest.raises(ValueError, match="Check: room must have [0-9]+ bytes for 9 rows, got 100"):
        wide(hidden, mask, room[:100])
    assert (gone, first.tolist()) == (wide(hidden, mask)[0], wide.leave(wide(hidden, mask)[1], 9).tolist())
    with torch.device("meta"):
        assert ops.Check.room((wide,), torch.zeros(2, 3, 70)) is None


def test_registered_and_without_a_gradient():
    hidden, mask, weight, bias, pooler = inputs(p=12)
    args = (hidden, torch.nn.Parameter(weight), bias, mask, pooler["pooler_weight"], pooler["pooler_bias"], "tanh")
    torch.library.opcheck(torch.ops.exeunt.classify.default, args)
    direct = ops.classify(hidden, weight, bias, mask=mask, **pooler)[0]
    assert torch.equal(torch.ops.exeunt.classify(*args)[0], direct)
    with pytest.raises(RuntimeError, match="classify has no gradient and hidden requires one"):
        ops.classify(hidden.requires_grad_(), weight, bias, **pooler)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(hidden=torch.zeros(8)), ValueError, r"hidden must have shape \[N, D\] or \[N, S, D\], got \[8\]"),
        (dict(hidden=torch.zeros(2, 8).double()), TypeError, "classify: hidden must be float32, bfloat16 or float16"),
        (dict(weight=torch.zeros(3, 9)), ValueError, r"classify: weight must have shape \[V, 8\] with V >= 1"),
        (dict(bias=torch.zeros(2)), ValueError, r"classify: bias must have shape \[3\], got \[2\]"),
        (dict(pooler_bias=torch.zeros(8)), ValueError, "pooler_bias needs a pooler_weight, got none"),
        (dict(activation="gelu"), ValueError, "activation must be one of none, tanh, relu, sigmoid, got 'gelu'"),
        (dict(mask=torch.ones(2, 5, dtype=torch.bool)), ValueError, r"mask must have shape \[N, S\] like hidden"),
        (dict(mask=torch.ones(2, 4)), TypeError, "mask must be bool on cpu, got torch.float32"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_gets_one_sentence(change, error, message):
    with pytest.raises(error, match=message):
        ops.classify(**dict(hidden=torch.zeros(2, 4, 8), weight=torch.zeros(3, 8)) | change)


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="measure must be one of max_prob, .*, got 'saturation'"):
        ops.Check(torch.zeros(2, 4), measure="saturation", threshold=0.5, tokens=False)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (
            dict(weight=torch.zeros(3, 8).double()),
            TypeError,
            "Check: weights must be float32, bfloat16 or float16 on cpu",
        ),
        (dict(weight=torch.zeros(8, 3).T), ValueError, "Check: weight must have unit stride along its rows"),
        (dict(weight=torch.zeros(8)), ValueError, r"Check: weight must have shape \[V, 8\] with V >= 1, got \[8\]"),
        (dict(pooler_weight=torch.zeros(7, 8)), ValueError, r"Check: weight must have shape \[V, 7\]"),
        (dict(bias=torch.zeros(2)), ValueError, r"Check: bias must have shape \[3\], got \[2\]"),
        (dict(activation="gelu"), ValueError, "Check: activation must be one of none, tanh, relu, sigmoid, got 'gelu'"),
        (
            dict(hidden=torch.zeros(2, 8)),
            ValueError,
            r"Check: hidden must be \[n, S, 8\] .* got \[2, 8\] torch.float32",
        ),
        (
            dict(hidden=torch.zeros(2, 4, 8).double()),
            ValueError,
            r"Check: hidden must be .* got \[2, 4, 8\] torch.float64",
        ),
        (
            dict(mask=torch.ones(2, 4).long()),
            ValueError,
            r"Check: mask must be bool of shape \[2, 4\], got torch.int64",
        ),
        (dict(mask=torch.ones(1, 4) > 0), ValueError, r"Check: mask must be bool of shape \[2, 4\], got .* \[1, 4\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_checks_get_one_sentence(change, error, message):
    given = dict(hidden=torch.zeros(2, 4, 8), mask=None, weight=torch.zeros(3, 8)) | change
    call = given.pop("hidden"), given.pop("mask")
    with pytest.raises(error, match=message):
        ops.Check(**given, measure="margin", threshold=0.5, tokens=True)(*call)


def test_a_check_follows_weights_that_are_put_elsewhere():
    head, states = torch.nn.Linear(8, 3), torch.randn(2, 4, 8)
    check = ops.Check(head.weight, head.bias, measure="margin", threshold=0.5, tokens=True)
    check(states, None)
    for dtype in (torch.bfloat16, torch.float32):
        head.to(dtype)
        _, out = check(states.to(dtype), None)
        assert torch.allclose(check.logits(out, 2), head(states.mean(1).to(dtype)).float(), rtol=0.05, atol=0.05)
    head.double()
    with pytest.raises(
        TypeError, match="Check: weights must be float32, bfloat16 or float16 on cpu, got torch.float64"
    ):
        check(states, None)


def test_a_check_of_weights_without_addresses_can_be_made():
    """As a model under FakeTensorMode has them: nothing is asked of them before the first call."""
    weight = torch.zeros(3, 8)
    weight.data_ptr = None
    ops.Check(weight, measure="margin", threshold=0.5, tokens=True)
