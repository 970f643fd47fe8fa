"""small_head, probe and saturation against their float64 references."""

from __future__ import annotations

import pytest
import torch

from exeunt import ops, reference
from exeunt.ops import _backend
from op_inputs import norm_args

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got, exact, dtype):
    # Rounding a pooled row to 8 or 11 bits may fall either way where float32 and float64 straddle the middle.
    step = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    return torch.allclose(got.double(), exact, rtol=step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("n,v,d,p", [(0, 2, 8, 8), (1, 2, 31, 33), (3, 35, 64, 20), (40, 17, 70, 70)])
def test_small_heads_match_the_reference(backend, n, v, d, p, pooled, kind, dtype):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (torch.randn(v, p if pooled else d, generator=g) / 6).to(dtype)
    args = dict(bias=torch.randn(v, generator=g), **norm_args(kind, d, dtype))
    if pooled:
        args |= dict(
            pooler_weight=(torch.randn(p, d, generator=g) / 6).to(dtype), pooler_bias=torch.randn(p, generator=g)
        )
    for activation in ("tanh", "relu", "sigmoid"):
        got = ops.small_head(hidden, weight, activation=activation, **args)
        exact = reference.small_head(hidden.double(), weight, activation=activation, **args)
        assert got.shape == (n, v) and got.dtype == torch.float32
        assert close(got, exact, dtype if pooled else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_any_stride(backend, dtype):
    hidden, weight, pooler = (torch.randn(shape).to(dtype) for shape in ((5, 300), (17, 40), (40, 300)))
    options = norm_args("layer", 300, dtype) | {"bias": torch.randn(17), "pooler_bias": torch.randn(40)}
    apart = {k: v.repeat_interleave(3)[::3] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert apart["bias"].stride() == apart["pooler_bias"].stride() == apart["norm_weight"].stride() == (3,)
    one, other = (ops.small_head(hidden, weight, pooler_weight=pooler, **given) for given in (options, apart))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_match_the_reference(backend, dtype):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(9, 50, generator=g).to(dtype), torch.randn(50, generator=g)
    inner, inner_weight = torch.randn(20, 50, generator=g) / 5, torch.randn(20, generator=g)
    for args in (dict(weight=weight, norm="rms"), dict(weight=inner_weight, hidden_weight=inner)):
        args["bias"] = torch.tensor(0.3)
        got, exact = ops.probe(hidden, **args), reference.probe(hidden.double(), **args)
        assert torch.allclose(got.double(), exact, atol=1e-5) and got.shape == (9,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturation_matches_the_reference(backend, dtype):
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(7, 77, generator=g).to(dtype)[:, ::2] for _ in range(2))
    a[1], b[2] = b[1], 0
    got, exact = ops.saturation(a, b), reference.saturation(a.double(), b.double())
    assert torch.allclose(got.double(), exact, atol=1e-6)
    assert got[1] == 1.0 and got[2] == 0.0


def test_rows_keep_their_bits_in_any_batch_and_thread_count(backend):
    g = torch.Generator().manual_seed(4)
    hidden, weight, pooler = (torch.randn(s, generator=g) for s in ((50, 300), (6, 400), (400, 300)))
    threads = torch.get_num_threads()
    alone = torch.cat([ops.small_head(hidden[i : i + 1], weight, pooler_weight=pooler) for i in range(50)])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.small_head(hidden, weight, pooler_weight=pooler), alone)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row(backend):
    hidden = torch.randn(4, 32)
    clean = ops.probe(hidden, torch.ones(32), norm="rms")
    hidden[2, 3] = torch.nan
    got = ops.probe(hidden, torch.ones(32), norm="rms")
    assert torch.isnan(got[2]) and torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])
    assert torch.isnan(ops.saturation(hidden, torch.ones(4, 32))[2])
    for activation in ("none", "tanh", "relu", "sigmoid"):
        got = ops.small_head(hidden, torch.ones(2, 5), pooler_weight=torch.ones(5, 32), activation=activation)
        assert torch.isnan(got).all(1).tolist() == [False, False, True, False]
    far = ops.probe(torch.tensor([[1e6], [-1e6]]), torch.ones(1))
    assert far.tolist() == [1.0, pytest.approx(0.0, abs=1e-30)]


def test_ops_are_registered_and_gradients_refused():
    hidden, weight = torch.randn(3, 16), torch.nn.Parameter(torch.randn(2, 16))
    args = (hidden, weight, None, None, None, "tanh", "none", "rms", None, None, 1e-6)
    torch.library.opcheck(torch.ops.exeunt.small_head.default, args)
    torch.library.opcheck(torch.ops.exeunt.saturation.default, (hidden, hidden + 1))
    with pytest.raises(RuntimeError, match="small_head has no gradient and hidden requires one"):
        ops.small_head(hidden.requires_grad_(), weight)
    with pytest.raises(RuntimeError, match="saturation has no gradient and hidden requires one"):
        ops.saturation(hidden, torch.ones(3, 16))
    with pytest.raises(RuntimeError, match="saturation has no gradient and previous requires one"):
        ops.saturation(torch.ones(3, 16), hidden)
    with torch.no_grad():
        ops.small_head(hidden, weight)


N, D, V = 3, 8, 2


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(hidden=torch.zeros(D)), ValueError, r"small_head: hidden must have shape \[N, D\], got \[8\]"),
        (dict(hidden=torch.zeros(N, D).double()), TypeError, "hidden must be float32, bfloat16 or float16, got"),
        (dict(weight=torch.zeros(V, D + 1)), ValueError, r"weight must have shape \[V, 8\] with V >= 1, got \[2, 9\]"),
        (dict(weight=torch.zeros(V, D).bfloat16()), TypeError, "weight must be float32 or torch.float32 on cpu, got"),
        (dict(weight=torch.zeros(D, V).T), ValueError, "weight must have unit stride along its rows"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias must have shape \[2\], got \[3\]"),
        (dict(pooler_bias=torch.zeros(D)), ValueError, "pooler_bias needs a pooler_weight, got none"),
        (dict(activation="gelu"), ValueError, "activation must be one of none, tanh, relu, sigmoid, got 'gelu'"),
        (dict(final="gelu"), ValueError, "final must be one of none, tanh, relu, sigmoid, got 'gelu'"),
        (dict(norm="batch"), ValueError, "norm must be None, 'rms' or 'layer', got 'batch'"),
        (dict(eps=-1.0), ValueError, "eps must be finite and not negative, got -1.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_gets_one_sentence(change, error, message):
    with pytest.raises(error, match=message):
        ops.small_head(**dict(hidden=torch.zeros(N, D), weight=torch.zeros(V, D)) | change)


def test_bad_probes_and_saturations_get_one_sentence():
    with pytest.raises(ValueError, match=r"probe: weight must have shape \[D\]"):
        ops.probe(torch.zeros(N, D), torch.zeros(1, D))
    with pytest.raises(ValueError, match=r"probe: bias must be one number, got shape \[3\]"):
        ops.probe(torch.zeros(N, D), torch.zeros(D), torch.zeros(3))
    with pytest.raises(ValueError, match=r"probe: hidden_weight must have shape \[V, 8\] with V >= 1, got \[4, 7\]"):
        ops.probe(torch.zeros(N, D), torch.zeros(4), hidden_weight=torch.zeros(4, D - 1))
    with pytest.raises(
        ValueError, match=r"hidden and previous must both have shape \[N, D\], got \[3, 8\] and \[3, 7\]"
    ):
        ops.saturation(torch.zeros(N, D), torch.zeros(N, D - 1))
    with pytest.raises(TypeError, match="saturation: previous must be float32, bfloat16 or float16"):
        ops.saturation(torch.zeros(N, D), torch.zeros(N, D).long())


@pytest.mark.parametrize("inputs", [512, 500])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_threads_share_a_large_pooler(inputs, n, monkeypatch):
    """Of one block of rows; 520 outputs are 32 tiles and a half, which 3 threads cannot share evenly."""
    torch.manual_seed(0)
    hidden, pooler, weight = torch.randn(n, inputs), torch.randn(520, inputs) / 23, torch.randn(5, 520) / 23
    options = dict(pooler_weight=pooler, pooler_bias=torch.randn(520))
    want = reference.small_head(hidden, weight, **options)
    got = []
    for threads in (1, 2, 3, 50):
        monkeypatch.setattr(_backend, "place", lambda device, threads=threads: (threads,))
        got.append(ops.small_head(hidden, weight, **options))
    torch.testing.assert_close(got[0], want, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(other, got[0]) for other in got[1:])
