"""exit_stats as a torch operator: schema, fake, autograd, torch.compile, and what it says to bad input."""

from __future__ import annotations

import math

import pytest
import torch

from exeunt import ops, reference
from exeunt.ops import _backend

N, V, D = 3, 40, 16


def arguments(**kw):
    hidden = torch.randn(N, D)
    head = torch.nn.Parameter(torch.randn(V, D))
    weight = torch.nn.Parameter(torch.rand(D))
    args = dict(
        head_bias=None, norm="rms", norm_weight=weight, norm_bias=None, eps=1e-5, scale=1.0, softcap=None,
        temperature=1.0, rows=None, count=None, columns=None, target=None, topk=0, seeds=None, entropy=True,
        logits_out=None,
    )  # fmt: skip
    return (hidden, head), {**args, **kw}


def cases():
    yield {}
    yield dict(norm="layer", norm_bias=torch.nn.Parameter(torch.zeros(D)), softcap=5.0)
    yield dict(head_bias=torch.nn.Parameter(torch.randn(V)), rows=torch.tensor([2, 0]))
    yield dict(rows=torch.tensor([1, 2], dtype=torch.int32), count=torch.tensor(2))
    yield dict(logits_out=torch.empty(N, V))


@pytest.mark.parametrize("case", cases(), ids=lambda c: ",".join(c) or "plain")
def test_opcheck_with_parameters(case):
    args, kwargs = arguments(**case)
    torch.library.opcheck(torch.ops.exeunt.exit_stats.default, (*args, None, None, *kwargs.values()))  # nothing packed


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 1])])
def test_compiles_into_one_graph(rows):
    args, kwargs = arguments(rows=rows)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}

    def step(hidden, head):
        stats = ops.exit_stats(hidden * 2.0, head, **kwargs)
        return stats.margin, stats.entropy, stats.argmax

    with torch.no_grad():
        expected = step(*args)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor():
    args, kwargs = arguments()
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    step = lambda hidden, head: ops.exit_stats(hidden * 2.0, head, **kwargs).margin + 1.0  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(*args), step(*args))


def test_logits_out_is_seen_as_mutated_under_compile():
    args, _ = arguments()

    def step(hidden, head):
        out = torch.zeros(N, V)
        stats = ops.exit_stats(hidden, head, logits_out=out)
        return stats.top1, out.max(-1).values

    with torch.no_grad():
        top1, largest = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(top1, largest)


def test_hidden_that_wants_a_gradient_is_told_where_there_is_one():
    (hidden, head), kwargs = arguments()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient .* exeunt\.reference\.exit_stats"):
        ops.exit_stats(hidden, head, **kwargs)
    with torch.no_grad():
        assert not ops.exit_stats(hidden, head, **kwargs).top1.requires_grad
    reference.exit_stats(hidden, head, **kwargs).margin.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(head.grad).all()


def test_direct_path_and_dispatcher_agree():
    args, kwargs = arguments()
    through = torch.ops.exeunt.exit_stats(*args, None, None, *kwargs.values())
    with torch.no_grad():
        direct = ops.exit_stats(*args, **kwargs)
    for a, b in zip(direct[:5], through[:5], strict=True):
        assert torch.equal(a, b)


def test_meta_tensors_give_shapes():
    stats = ops.exit_stats(torch.empty(5, D, device="meta"), torch.empty(V, D, device="meta"))
    assert stats.argmax.shape == (5,) and stats.argmax.dtype == torch.int64 and stats.top1.device.type == "meta"


def test_reference_serves_where_there_is_no_extension(monkeypatch):
    args, kwargs = arguments(logits_out=torch.zeros(N, V))
    with torch.no_grad():
        expected = ops.exit_stats(*args, **{**kwargs, "logits_out": None})
        monkeypatch.setattr(_backend, "cpu", None)
        monkeypatch.setattr(_backend, "_warned", set())
        with pytest.warns(UserWarning, match="torch reference serves"):
            got = ops.exit_stats(*args, **kwargs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert (kwargs["logits_out"] != 0).any()


BAD = [
    (dict(hidden=torch.zeros(2, 3, D)), ValueError, r"hidden must have shape \[N, D\], got \[2, 3, 16\]"),
    (dict(head=torch.zeros(V, D + 1)), ValueError, r"head must have shape \[V, 16\] .*got \[40, 17\]"),
    (dict(head=torch.zeros(0, D)), ValueError, r"head must have shape"),
    (
        dict(hidden=torch.zeros(N, D).double()),
        TypeError,
        r"hidden must be float32, bfloat16 or float16, got torch.float64",
    ),
    (dict(head=torch.zeros(V, D).bfloat16()), TypeError, r"head must have the dtype of hidden, torch.float32"),
    (dict(head=torch.zeros(D, V).T), ValueError, r"head must have unit stride along D"),
    (dict(norm="batch"), ValueError, r"norm must be None, 'rms' or 'layer', got 'batch'"),
    (dict(norm_weight=torch.zeros(D + 1)), ValueError, r"norm_weight must have shape \[16\], got \[17\]"),
    (dict(norm_bias=torch.zeros(D).half()), TypeError, r"norm_bias must be float32 or torch.float32"),
    (dict(head_bias=torch.zeros(V, 1)), ValueError, r"head_bias must have shape \[40\]"),
    (dict(logits_out=torch.zeros(N, V + 1)), ValueError, r"logits_out must have shape \[3, 40\], got \[3, 41\]"),
    (dict(logits_out=torch.zeros(V, N).T), ValueError, r"logits_out must have unit stride"),
    (dict(logits_out=torch.zeros(N, V).half()), TypeError, r"logits_out must be float32"),
    (dict(rows=torch.tensor([0.0])), TypeError, r"rows must be int32 or int64, got torch.float32"),
    (dict(rows=torch.tensor([[0]])), ValueError, r"rows must have shape \[M\], got \[1, 1\]"),
    (dict(rows=torch.tensor([0, N])), ValueError, r"rows must lie in 0\.\.2, got 0\.\.3"),
    (dict(rows=torch.tensor([-1])), ValueError, r"rows must lie in 0\.\.2, got -1\.\.-1"),
    (dict(count=torch.tensor([1, 2])), ValueError, r"count must have shape \[\] or \[1\]"),
    (dict(head=torch.zeros(V, D, device="meta")), ValueError, r"head must be on cpu like hidden, got meta"),
    (dict(eps=-1.0), ValueError, r"eps must be finite and not negative, got -1.0"),
    (dict(scale=math.inf), ValueError, r"scale must be a finite float32, got inf"),
    (dict(softcap=0.0), ValueError, r"softcap must be a finite, positive float32, got 0.0"),
    (dict(softcap=1e-50), ValueError, r"softcap must be a finite, positive float32, got 1e-50"),
    (dict(temperature=0.0), ValueError, r"temperature must be a finite, positive float32, got 0.0"),
    (dict(temperature=1e39), ValueError, r"temperature must be a finite, positive float32, got 1e\+39"),
    (dict(rows=torch.tensor(0)), ValueError, r"rows must have shape \[M\], got \[\]"),
    (dict(topk=2.5), ValueError, r"topk must be an integer in 0..8, got 2.5"),
    (dict(head=torch.nn.Linear(D, V)), TypeError, r"head must be a Tensor, PackedHead or Fp8Head, got Linear"),
    (
        dict(hidden=torch.zeros(N, 0), head=torch.zeros(V, 0)),
        ValueError,
        r"head must have shape \[V, 0\] with V, D >= 1",
    ),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=[m[2].split(" ")[0] + f"-{i}" for i, m in enumerate(BAD)])
def test_bad_input_gets_one_sentence(change, error, message):
    kwargs = {**dict(hidden=torch.zeros(N, D), head=torch.zeros(V, D)), **change}
    with pytest.raises(error, match=message) as caught:
        ops.exit_stats(**kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("exit_stats: ")


def test_unknown_isa_limit():
    if _backend.cpu is None:
        pytest.skip("exeunt._cpu is not built")
    with pytest.raises(ValueError, match="must be baseline, avx2, avx512, avx512_vnni, avx512_bf16 or amx, got 'sse9'"):
        _backend.cpu.select_isa("sse9")
