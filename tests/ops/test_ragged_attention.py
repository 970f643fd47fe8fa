"""ragged_attention against its specification: shapes, dtypes, instruction sets, caches of every layout, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import backends
from conftest import BACKENDS, available_isas
from exeunt import ops, reference
from exeunt.ops import _backend
from ragged_inputs import DTYPES, assert_close, exact, inputs

#: Hopper has no kernel of its own for this op.
on_every_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "emulated_sm90"], indirect=True)


CASES = {
    "decode": dict(lengths=(70, 1, 513, 64, 1100, 2049), queries=(1,) * 6),
    "left-padded": dict(lengths=(70, 200, 65), queries=(1, 3, 1), start=(3, 130, 65)),
    "rows in any order, one twice": dict(lengths=(70, 33, 12), queries=(2, 1, 2), rows=[3, 0, 3]),
    "no query for a row": dict(lengths=(5, 9, 7), queries=(0, 2, 0)),
    "no keys for a row": dict(lengths=(0, 9), queries=(2, 1)),
    "more queries than keys": dict(lengths=(3,), queries=(8,)),
    "prompt": dict(lengths=(130, 40), queries=(130, 40), heads=3, kv_heads=1),
    "many vectors": dict(lengths=(90,), queries=(20,), heads=6, kv_heads=1, size=40, value_size=24),
    "bidirectional": dict(lengths=(70, 12), queries=(70, 12), causal=False),
    "positions": dict(lengths=(80, 30), queries=(5, 4), positions=True),
    "bidirectional, some positions": dict(lengths=(80, 30), queries=(5, 4), positions=True, causal=False, alibi=True),
    "window": dict(lengths=(200, 70, 3), queries=(3, 70, 1), window=20, start=(0, 9, 1)),
    "window across chunks": dict(lengths=(1300,), queries=(9,), window=600),
    "window of one": dict(lengths=(70,), queries=(5,), window=1),
    "a window beyond the keys": dict(
        lengths=(1, 70), queries=(3, 2), window=1, positions=torch.tensor([1, 2, 3, 70, 75])
    ),
    "softcap": dict(lengths=(70, 9), queries=(2, 1), softcap=2.0, scale=1.0),
    "alibi": dict(lengths=(70, 130), queries=(2, 9), alibi=True, start=(7, 0)),
    "bias": dict(lengths=(70, 130), queries=(2, 9), bias=True, start=(7, 0)),
    "pages": dict(lengths=(70, 130, 16), queries=(2, 9, 1), page=16, start=(17, 0, 15)),
    "long pages": dict(lengths=(70, 300), queries=(2, 1), page=100),
    "pages of one": dict(lengths=(20,), queries=(2,), page=1, size=8),
    "narrowed": dict(lengths=(70, 130), queries=(1, 2), layout="narrowed"),
    "slots first": dict(lengths=(70, 130), queries=(1, 2), layout="slots first"),
    "odd": dict(lengths=(35, 67), queries=(1, 3), heads=3, kv_heads=3, size=5, value_size=7, layout="narrowed"),
    "wide heads": dict(lengths=(70,), queries=(3,), size=128, value_size=256),
    "80": dict(lengths=(70,), queries=(17,), size=80, value_size=72),
    "one": dict(lengths=(1,), queries=(1,), heads=1, kv_heads=1, size=1),
    "nothing": dict(lengths=(), queries=()),
}


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_specification(backend, case, dtype):
    args, options = inputs(dtype, **CASES[case])
    assert_close(ops.ragged_attention(*args, **options), args, options)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch(backend, dtype):
    """Contract 6 beside torch's own attention over one long row."""
    args, options = inputs(dtype, lengths=(900,), queries=(8,), heads=8, kv_heads=2, size=64, seed=3)
    q, keys, values = args[0][None].transpose(1, 2), args[1][:1, :, :900], args[2][:1, :, :900]
    mask = torch.arange(900) <= torch.arange(892, 900)[:, None]
    theirs = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)[0].transpose(0, 1)
    want = exact(args, options)
    ours = (ops.ragged_attention(*args, **options) - want).abs().max()
    assert ours <= 2 * (theirs - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(backend, dtype):
    """Alone, in a batch, at any left padding, on any threads (which split keys), and each of its tokens alone."""
    lengths, queries, rows = (700, 40, 1300, 1030), (9, 1, 2, 1), [2, 0, 1, 3]
    args, _ = inputs(dtype, lengths=lengths, queries=queries, rows=rows, heads=8, kv_heads=2, size=64)
    q, keys, values, bounds, listed, held = args
    together = ops.ragged_attention(*args)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(ops.ragged_attention(*args), together)
    torch.set_num_threads(threads)
    for r in range(4):
        own, length = slice(bounds[r], bounds[r + 1]), lengths[r]
        alone = torch.tensor([0, queries[r]])
        got = ops.ragged_attention(q[own], keys, values, alone, listed[r : r + 1], held[r : r + 1])
        assert torch.equal(got, together[own])
        # The same keys behind 13 that are padding
        moved = [torch.cat((t[rows[r]].new_full((2, 13, 64), math.nan), t[rows[r]][:, :length]), 1)[None]
                 for t in (keys, values)]  # fmt: skip
        where = torch.tensor([0]), torch.tensor([length + 13])
        got = ops.ragged_attention(q[own], *moved, alone, *where, kv_start=torch.tensor([13]))
        assert torch.equal(got, together[own])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", [0.0625, 0.25, 0.5, 2.0, 32.0, -0.25, -32.0])
def test_scores_that_rise_from_key_to_key(backend, dtype, rise):
    """Sums are shrunk where a maximum rises by much; little rises add up, and great ones must not overflow."""
    args, options = inputs(dtype, lengths=(1100,), queries=(2,), heads=4, kv_heads=2, size=64)
    q, keys = args[:2]
    q.zero_()[..., 0], keys[..., 0] = 8.0, torch.arange(keys.shape[2]) * rise  # scores: exactly these
    assert_close(ops.ragged_attention(*args, **options), args, options)


@on_every_backend
@pytest.mark.parametrize("window", [None, 7000])
def test_a_task_of_many_chunks(backend, window):
    """Threads split a long row; each does some chunks at once, and the last of them fewer."""
    args, options = inputs(lengths=(9001,), queries=(2,), start=(3,), heads=4, kv_heads=4, window=window)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = ops.ragged_attention(*args, **options)
    torch.set_num_threads(2)
    assert torch.equal(ops.ragged_attention(*args, **options), whole)
    torch.set_num_threads(threads)
    assert_close(whole, args, options)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_alone_has_the_bits_that_it_has_among_others(backend, dtype):
    if backend in ("emulated", "cuda"):
        pytest.skip("other shapes of tiles serve many queries")
    args, _ = inputs(dtype, lengths=(1100,), queries=(9,), heads=8, kv_heads=2, size=64)
    q, keys, values, _, row, _ = args
    together = ops.ragged_attention(*args)
    for i in range(9):
        got = ops.ragged_attention(q[i : i + 1], keys, values, torch.tensor([0, 1]), row, torch.tensor([1092 + i]))
        assert torch.equal(got, together[i : i + 1])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_out_of_range_does_not_matter(backend, dtype, value):
    for page in (None, 16):
        args, options = inputs(dtype, lengths=(70, 33), queries=(2, 1), start=(5, 0), rows=[1, 0], page=page)
        want = ops.ragged_attention(*args, **options)
        if page is None:
            seen = torch.zeros(args[1].shape[0], 1, args[1].shape[2], 1, dtype=torch.bool)
            seen[1, :, 5:70] = seen[0, :, :33] = True
        else:
            seen = torch.zeros(args[1].shape[0], 1, page, 1, dtype=torch.bool)
            for row, at in [(1, k) for k in range(5, 70)] + [(0, k) for k in range(33)]:
                seen[options["pages"][row, at // page], :, at % page] = True
        for t in args[1:3]:
            t.masked_fill_(~seen, value)
        assert torch.equal(ops.ragged_attention(*args, **options), want)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_value_shows_in_its_column_alone(backend, dtype, value):
    """Tile registers multiply neighbouring values with a zero: not if one is no number."""
    args, options = inputs(dtype, lengths=(700, 70), queries=(3, 1), heads=8, kv_heads=2, size=64)
    want = ops.ragged_attention(*args, **options)
    for column in (0, 33, 63):
        values = args[2].clone()
        values[args[4][0], 1, 30, column] = value
        got = ops.ragged_attention(*args[:2], values, *args[3:], **options)
        assert not got[:3, 4:, column].isfinite().any()
        got[:3, 4:, column] = want[:3, 4:, column]
        assert torch.equal(got, want)


@on_every_backend
def test_a_bad_key_shows_in_the_rows_that_see_it(backend):
    args, options = inputs(torch.bfloat16, lengths=(70, 70), queries=(1, 1))
    args[1][0, :, 30] = math.nan
    got = ops.ragged_attention(*args, **options)
    assert got[0].isnan().all() and not got[1].isnan().any()


@on_every_backend
def test_hidden_keys(backend):
    """-inf in the bias hides a key; a query that sees none gives zeros."""
    args, _ = inputs(lengths=(70,), queries=(2,))
    bias = torch.zeros(2, 1, 73).index_fill(2, torch.arange(40, 73), -torch.inf).expand(2, 4, 73).clone()
    bias[1] = -torch.inf
    got = ops.ragged_attention(*args, bias=bias)
    short = ops.ragged_attention(args[0][:1], *args[1:3], torch.tensor([0, 1]), args[4], torch.tensor([40]))
    torch.testing.assert_close(got[:1], short)
    assert not got[1].any()


@on_every_backend
def test_biases_of_any_strides(backend):
    args, _ = inputs(torch.bfloat16, lengths=(70, 40), queries=(2, 1))
    bias = torch.randn(73, 4, 3)
    turned = bias.permute(2, 1, 0)
    shared = bias[:, :, 0].t().expand(3, 4, 73), turned[:1, :1].expand(3, 4, 73)
    for view in (turned, *shared, turned.bfloat16()[..., :70]):
        assert_close(ops.ragged_attention(*args, bias=view), args, dict(bias=view))


@on_every_backend
def test_only_the_first_entries_are_active(backend):
    args, _ = inputs(lengths=(70, 40, 9), queries=(2, 1, 3))
    whole = ops.ragged_attention(*args)
    for count in range(4):
        got = ops.ragged_attention(*args, count=torch.tensor([count], dtype=torch.int32))
        live = int(args[3][count])
        assert torch.equal(got[:live], whole[:live]) and not got[live:].any()
        assert torch.equal(reference.ragged_attention(*args, count=torch.tensor(count))[live:], got[live:])


@on_every_backend
def test_lists_of_int32(backend):
    args, options = inputs(lengths=(70, 40), queries=(2, 1), start=(1, 2), positions=True)
    narrow = [t.int() for t in args[3:]]
    got = ops.ragged_attention(*args[:3], *narrow, **{k: t.int() for k, t in options.items()})
    assert torch.equal(got, ops.ragged_attention(*args, **options))


@st.composite
def calls(draw):
    entries = draw(st.integers(0, 5))
    lengths = [draw(st.integers(0, 150)) for _ in range(entries)]
    kv_heads = draw(st.integers(1, 3))
    causal = draw(st.booleans())
    return dict(
        dtype=draw(st.sampled_from(DTYPES)), lengths=lengths, queries=[draw(st.integers(0, 6)) for _ in lengths],
        start=[draw(st.integers(0, n)) for n in lengths] if entries else None,
        rows=draw(st.lists(st.integers(0, 6), min_size=entries, max_size=entries)), kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 5)), size=draw(st.integers(1, 40)), value_size=draw(st.integers(1, 40)),
        page=draw(st.sampled_from([None, None, 1, 7, 16, 64, 100])), seed=draw(st.integers(0, 99)),
        layout=draw(st.sampled_from(["plain", "narrowed", "slots first"])), causal=causal,
        window=draw(st.none() | st.integers(1, 90)) if causal else None, positions=draw(st.booleans()) or None,
        alibi=draw(st.booleans()) or None, bias=draw(st.booleans()) or None,
        softcap=draw(st.sampled_from([None, 3.0])),
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(calls())
def test_any_rows_lengths_pages_and_windows(every_kernel, call):
    args, options = inputs(**call)
    for _ in every_kernel():
        assert_close(ops.ragged_attention(*args, **options), args, options)


@pytest.fixture(scope="module")
def every_kernel():
    """Every instruction set, then CUDA by emulation, one after the other, once per drawn call."""
    cpu = _backend.cpu
    chosen = cpu.isa() if cpu else None

    def one_after_the_other():
        for isa in available_isas():
            cpu.select_isa(isa)
            yield isa
        if backends.emulated():
            _backend.cpu = backends.Emulated()
            yield "emulated"
            _backend.cpu = cpu

    yield one_after_the_other
    _backend.cpu = cpu
    if chosen:
        cpu.select_isa(chosen)


# ---- the edges, one by one: each of these is an off-by-one away -----------------------------------------------------


def seen_keys(**call):
    """Which keys each query of one head sees: values are one-hot, all scores are equal."""
    args, options = inputs(heads=1, kv_heads=1, **call)
    room = args[1].shape[2]
    args[0].zero_()
    if "pages" in options:
        at = torch.arange(options["pages"].shape[1] * room)
        values = torch.zeros(args[1].shape[0], 1, room, len(at))
        values[options["pages"][0].long()[at // room], 0, at % room] = torch.eye(len(at))
    else:
        values = torch.eye(room).expand(args[1].shape[0], 1, room, room).contiguous()
    parts = [ops.ragged_attention(args[0], args[1], some, *args[3:], **options) for some in values.split(200, 3)]
    out = torch.cat(parts, 2)[:, 0]
    return [set(row.nonzero().flatten().tolist()) for row in out]


@on_every_backend
def test_window_edge(backend):
    assert seen_keys(lengths=(70,), queries=(3,), window=5) == [set(range(n - 4, n + 1)) for n in (67, 68, 69)]
    assert seen_keys(lengths=(70,), queries=(1,), window=6, start=(64,)) == [set(range(64, 70))]


@on_every_backend
def test_left_padding_edge(backend):
    assert seen_keys(lengths=(70,), queries=(2,), start=(33,)) == [set(range(33, 69)), set(range(33, 70))]
    assert seen_keys(lengths=(4,), queries=(4,), start=(2,)) == [set(), set(), {2}, {2, 3}]


@on_every_backend
def test_last_page_edge(backend):
    for length in (15, 16, 17, 64, 65):
        assert seen_keys(lengths=(length,), queries=(1,), page=16) == [set(range(length))]


@on_every_backend
def test_causal_edge_and_chunk_edges(backend):
    for length in (31, 32, 33, 63, 64, 65, 1024, 1025):
        assert seen_keys(lengths=(length,), queries=(2,)) == [set(range(length - 1)), set(range(length))]


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "q must be float32": lambda a: a | {"q": a["q"].double()},
    r"expected q \[T, Hq, Dh\]": lambda a: a | {"q": a["q"][0]},
    r"expected k_cache \[B, Hkv, S, 16\]": lambda a: a | {"k_cache": a["k_cache"][..., :8]},
    "that go with q, got": lambda a: a | {"v_cache": a["v_cache"][:, :, :-1]},
    "key heads must divide": lambda a: a | {"q": a["q"][:, :3]},
    "k_cache must be torch.float32": lambda a: a | {"k_cache": a["k_cache"].half()},
    "v_cache must have unit stride": lambda a: a | {"v_cache": a["v_cache"].mT.contiguous().mT},
    "q must have unit stride": lambda a: a | {"q": a["q"].transpose(1, 2).contiguous().transpose(1, 2)},
    r"rows must be \[2\] int64": lambda a: a | {"rows": a["rows"].float()},
    r"rows must be \[R\] int64 or int32": lambda a: a | {"rows": a["rows"][:, None]},
    r"q_indptr must be \[3\]": lambda a: a | {"q_indptr": a["q_indptr"][:2]},
    r"kv_len must be \[2\]": lambda a: a | {"kv_len": a["kv_len"][:1]},
    r"kv_start must be \[2\]": lambda a: a | {"kv_start": torch.tensor([0])},
    r"positions must be \[3\]": lambda a: a | {"positions": torch.tensor([0])},
    "q_indptr must rise from 0 to 3, got": lambda a: a | {"q_indptr": torch.tensor([0, 2, 4])},
    "q_indptr must rise, got 2|from 0 to 3, got .0, 4": lambda a: a | {
        "q_indptr": torch.tensor([0, 4, 2, 3]), "rows": torch.tensor([0, 1, 1]), "kv_len": torch.tensor([1, 1, 1])},
    r"rows must lie in 0\.\.3, got 4 at 1": lambda a: a | {"rows": torch.tensor([0, 4])},
    r"rows must lie in 0\.\.3, got -1 at 0": lambda a: a | {"rows": torch.tensor([-1, 0])},
    r"kv_len must lie in 0\.\.12, the keys of a row, got 13 at 1": lambda a: a | {"kv_len": torch.tensor([1, 13])},
    "kv_start must lie in 0.*got 3 at 0": lambda a: a | {"kv_start": a["kv_len"] * 0 + 3,
                                                         "kv_len": a["kv_len"] * 0 + 2},
    "window needs causal=True": lambda a: a | {"window": 4, "causal": False},
    "window must be at least 1": lambda a: a | {"window": 0},
    "softcap must be positive": lambda a: a | {"softcap": 0.0},
    r"alibi must be \[4\] float32": lambda a: a | {"alibi": torch.ones(3)},
    r"bias must be \[3, 4, K\]": lambda a: a | {"bias": torch.ones(3, 12)},
    "bias must be float32 or": lambda a: a | {"bias": torch.ones(3, 4, 12).double()},
    "bias must reach over": lambda a: a | {"bias": torch.ones(3, 4, 8)},
    r"pages must be \[rows, n\] int32": lambda a: a | {"pages": torch.ones(4, 1)},
    r"pages must lie in 0\.\.3, got": lambda a: a | {"pages": torch.full((4, 1), 4, dtype=torch.int32)},
    r"kv_len must lie in 0\.\.0": lambda a: a | {"pages": torch.ones(4, 0, dtype=torch.int32)},
    "count must be one int32": lambda a: a | {"count": torch.tensor([1, 2])},
    r"count must lie in 0\.\.2, got 3": lambda a: a | {"count": torch.tensor(3)},
}  # fmt: skip


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_gets_one_sentence(sentence, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("exeunt.ops._backend.cpu", None)
    args, _ = inputs(lengths=(9, 5), queries=(2, 1), rows=[0, 2])
    names = "q", "k_cache", "v_cache", "q_indptr", "rows", "kv_len"
    args = (args[0], args[1][:, :, :12], args[2][:, :, :12], *args[3:])
    bad = BAD[sentence](dict(zip(names, args, strict=True)))
    with pytest.raises((ValueError, TypeError), match=f"^ragged_attention: .*({sentence})[^\n]*$"):
        ops.ragged_attention(**bad)


# ---- as a torch operator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["left-padded", "pages", "bias", "positions"])
def test_opcheck(case):
    args, options = inputs(**CASES[case])
    names = ("kv_start", "positions", "causal", "window", "softcap", "scale", "alibi", "bias", "pages", "count")
    given = [options.get(name, True if name == "causal" else None) for name in names]
    torch.library.opcheck(torch.ops.exeunt.ragged_attention.default, (*args, *given))


def test_compiles_into_one_graph():
    args, options = inputs(**CASES["left-padded"])

    def step(q):
        return ops.ragged_attention(q * 2.0, *args[1:], **options) + 1.0

    expected = step(args[0])
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(args[0]), expected)


def test_no_gradient_but_a_sentence():
    args, options = inputs(lengths=(9,), queries=(1,))
    with pytest.raises(RuntimeError, match="ragged_attention has no gradient and q requires one"):
        ops.ragged_attention(args[0].requires_grad_(), *args[1:], **options)
    out = reference.ragged_attention(args[0], *args[1:], **options)
    out.sum().backward()
    assert args[0].grad.isfinite().all()
