"""kv_fill against its float64 reference: every kind of stack, backend and dtype, no other slot touched."""

from __future__ import annotations

import math

import pytest
import torch

from exeunt import ops, reference
from exeunt.ops import KVCache, KVLayer, KVStack, _backend
from op_inputs import lies_turned

pytestmark = pytest.mark.skipif(_backend.cpu is None, reason="exeunt._cpu is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS, BATCH = 3, 5
UNTOUCHED = -1024.0  # what no key or value comes near, exact in every dtype


@pytest.fixture
def backend(backend):
    if backend == "emulated_sm90":
        pytest.skip("kv_fill has no kernels for Hopper alone")
    return backend


def stack(dtype, heads=2, size=16, width=64, norm="rms", key_norm=None, bias=False, fused=False, weighted=True, seed=0,
          **facts):  # fmt: skip
    """A random stack; `fused` makes keys and values views of one projection, head by head as in GPT-NeoX."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape, spread=1.0, at=0.0):
        return (at + spread * torch.randn(*shape, generator=g)).to(dtype)

    layers = []
    for _ in range(LAYERS):
        weight = make(heads, 3, size, width, spread=1 / math.sqrt(width))
        vector = make(heads, 3, size, spread=0.1)
        key, value = (weight[:, 1], weight[:, 2]) if fused else (weight[:, 1].contiguous(), weight[:, 2].contiguous())
        layers.append(
            KVLayer(
                key,
                value,
                key_bias=vector[:, 1] if bias else None,
                value_bias=vector[:, 2] if bias else None,
                norm_weight=make(width, spread=0.2, at=1.0) if norm and weighted else None,
                norm_bias=make(width, spread=0.1) if norm == "layer" else None,
                key_norm=make(*((heads, size) if fused else (size,)), spread=0.2, at=1.0) if key_norm else None,
            )
        )
    return KVStack(layers, norm=norm, key_norm=key_norm, **facts)


def inputs(kv, n, rotary=0, seed=1, hidden=None):
    g = torch.Generator().manual_seed(seed)
    places = torch.randperm(BATCH * (n // BATCH + 2), generator=g)[:n]
    return dict(
        hidden=torch.randn(n, kv.width, generator=g).to(hidden or kv.dtype),
        from_layer=torch.randint(0, LAYERS + 1, (n,), generator=g),
        rows=places % BATCH,
        slots=places // BATCH,
        rotary=tuple(torch.randn(2, n, rotary, generator=g)) if rotary else None,
    )


def cache(kv, n, dtype=None):
    """Keys and values, as views of a wider tensor; filled with what must stay where nothing is written."""
    shape = BATCH, kv.heads, n // BATCH + 2, kv.head_size + 8
    return [[torch.full(shape, UNTOUCHED, dtype=dtype or kv.dtype)[..., :-8] for _ in range(LAYERS)] for _ in range(2)]


def fill(op, kv, given, n, dtype=None, **more):
    keys, values = cache(kv, n, dtype)
    places = (given[name] for name in ("hidden", "from_layer", "rows", "slots"))
    op.kv_fill(*places, kv, KVCache(keys, values), **({"rotary": given["rotary"]} | more))
    return torch.stack(keys + values)


def assert_close(got, exact, kv):
    """Within the rounding of the cache's dtype, and of float32 sums; nothing else touched."""
    assert torch.equal(got == UNTOUCHED, exact == UNTOUCHED)
    eps = torch.finfo(kv.dtype).eps
    # A normalised element may round either way where float32 and float64 straddle the middle: one of D products.
    straddle = 0.0 if kv.dtype == torch.float32 else eps * 4 / math.sqrt(kv.width)
    assert torch.allclose(got.double(), exact, rtol=eps / 2 + 4e-6, atol=4e-6 + straddle)


KINDS = {
    "llama": dict(rotary=16),
    "unaligned": dict(width=77, size=5, heads=3, rotary=4, bias=True),
    "fused": dict(fused=True, bias=True, norm="layer", rotary=4),
    "qk-norm": dict(key_norm="rms", rotary=16, shift=1.0, heads=1, size=24, width=96),
    "per-head": dict(key_norm="layer", fused=True, rotary=8, interleaved=True, heads=3),
    "bare": dict(norm=None, width=32),
    "norm-bias-alone": dict(norm="layer", weighted=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 70])
def test_matches_the_reference(backend, n, kind, dtype):
    facts = dict(KINDS[kind])
    rotary = facts.pop("rotary", 0)
    kv = stack(dtype, **facts)
    given = inputs(kv, n, rotary)
    exact = fill(reference, kv, given | {"hidden": given["hidden"].double()}, n, torch.float64)
    assert_close(fill(ops, kv, given, n), exact, kv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 9, 20, 70])
def test_packed_projections_give_the_same_keys_and_values(isa, n, kind, dtype):
    facts = dict(KINDS[kind])
    rotary = facts.pop("rotary", 0)
    lying, packed = stack(dtype, **facts), stack(dtype, packed=True, **facts)
    given = inputs(lying, n, rotary)
    got = fill(ops, packed, given, n)
    if lies_turned(isa, dtype):
        assert torch.equal(got, fill(ops, lying, given, n))
    exact = fill(reference, packed, given | {"hidden": given["hidden"].double()}, n, torch.float64)
    assert_close(got, exact, packed)


def test_packed_projections_that_have_changed_are_refused():
    kv = stack(torch.bfloat16, packed=True)
    weights = sum(t.nbytes for layer in kv.layers for t in (layer.key, layer.value))
    assert kv.nbytes == weights and stack(torch.bfloat16).nbytes == 0
    given = inputs(kv, 2)
    fill(ops, kv, given, 2)
    kv.layers[-1].value.mul_(2)
    with pytest.raises(ValueError, match="^kv_fill: expected projections as they were when packed"):
        fill(ops, kv, given, 2)
    kv = KVStack(kv.layers, norm="rms", packed=True)
    assert torch.equal(fill(ops, kv, given, 2), fill(ops, KVStack(kv.layers, norm="rms"), given, 2))


def test_many_packed_rows_go_in_groups(backend):
    """More of them than are kept at a time: layers go in several groups on the CPU."""
    kv = stack(torch.float32, width=1500, heads=1)
    given = inputs(kv, 300, 8)
    exact = fill(reference, kv, given | {"hidden": given["hidden"].double()}, 300, torch.float64)
    assert_close(fill(ops, kv, given, 300), exact, kv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_on_any_threads(backend, dtype):
    kv = stack(dtype, heads=4, size=32, width=160)
    given = inputs(kv, 70, 32)
    together = fill(ops, kv, given, 70)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(fill(ops, kv, given, 70), together)
    torch.set_num_threads(threads)
    keys, values = cache(kv, 70)
    for n in range(70):
        one = {k: given[k][n : n + 1] for k in ("hidden", "from_layer", "rows", "slots")}
        pair = tuple(t[n : n + 1] for t in given["rotary"])
        ops.kv_fill(*one.values(), kv, KVCache(keys, values), rotary=pair)
    assert torch.equal(torch.stack(keys + values), together)


def test_segments_of_the_stack_make_the_whole(backend):
    kv = stack(torch.bfloat16)
    given = inputs(kv, 9, 16)
    whole = fill(ops, kv, given, 9)
    keys, values = cache(kv, 9)
    places = given["hidden"], given["from_layer"], given["rows"], given["slots"]
    held = KVCache(keys, values)
    ops.kv_fill(*places, kv, held, rotary=given["rotary"], until=2)
    assert (keys[2] == UNTOUCHED).all() and torch.equal(torch.stack(keys[:2]), whole[:2])
    late = places[1].clamp(min=2)
    ops.kv_fill(places[0], late, *places[2:], kv, held, rotary=given["rotary"])
    assert torch.equal(torch.stack(keys + values), whole)


def test_rotary_tables_by_layer_and_padding(backend):
    kv = stack(torch.float32)
    given = inputs(kv, 4, 16)
    given["slots"][2] = -1
    other = tuple(torch.randn(2, 4, 16))
    tables = [given["rotary"], None, other]
    got = fill(ops, kv, given, 4, rotary=tables)
    assert_close(got, fill(reference, kv, given | {"hidden": given["hidden"].double()}, 4, torch.float64,
                           rotary=tables), kv)  # fmt: skip
    assert torch.equal(got[1], fill(ops, kv, given, 4, rotary=None)[1])


@pytest.mark.parametrize("kinds", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float64,) * 2,
                                   (torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
def test_rotary_tables_are_read_in_the_dtype_they_come_in(backend, kinds):
    kv = stack(torch.float32)
    given = inputs(kv, 7, 16)
    cos, sin = (t.to(kind) for t, kind in zip(given["rotary"], kinds, strict=True))
    widened = fill(ops, kv, given, 7, rotary=(cos.float(), sin.float()))
    got = fill(ops, kv, given, 7, rotary=(cos, sin))
    assert torch.allclose(got, widened, rtol=1e-6, atol=1e-6)  # a compiler may fuse other multiply-adds
    assert torch.equal(fill(ops, kv, given, 7, rotary=(cos.T.contiguous().T, sin)), got)


def test_rows_may_grow_and_shrink_from_call_to_call():
    kv = stack(torch.float32)
    for n in (3, 70, 5):
        given = inputs(kv, n, 16)
        exact = fill(reference, kv, given | {"hidden": given["hidden"].double()}, n, torch.float64)
        assert_close(fill(ops, kv, given, n), exact, kv)


def test_places_are_held_to_the_cache_without_a_kernel_too(monkeypatch):
    kv = stack(torch.float32)
    kv.__dict__["kernel"] = None  # as for a device that has none
    monkeypatch.setattr(_backend, "_warned", {"kv_fill on cpu"})
    given = inputs(kv, 4, 16)
    exact = fill(reference, kv, given, 4)
    assert torch.equal(fill(ops, kv, given, 4), exact)
    with pytest.raises(ValueError, match="^kv_fill: expected places within a cache of 5 rows"):
        fill(ops, kv, given | {"rows": given["rows"] - 5, "from_layer": given["from_layer"] * 0}, 4)


def test_other_rows_do_not_feel_a_bad_one(backend):
    kv = stack(torch.bfloat16)
    given = inputs(kv, 6, 16)
    given["from_layer"][:] = 0
    good = fill(ops, kv, given, 6)
    given["hidden"][3, 5] = math.nan
    bad = fill(ops, kv, given, 6)
    row, slot = given["rows"][3], given["slots"][3]
    assert bad[:, row, :, slot].isnan().all()
    bad[:, row, :, slot] = good[:, row, :, slot]
    assert torch.equal(bad, good)


def test_weights_are_read_where_they_lie(backend):
    kv = stack(torch.float32)
    given = inputs(kv, 3, 16)
    given["from_layer"][:] = 0
    before = fill(ops, kv, given, 3)
    kv.layers[1].value.mul_(2)
    after = fill(ops, kv, given, 3)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 4 + [True, False]


def test_a_paged_cache_is_one_of_as_many_rows_as_pages(backend):
    kv, page, n = stack(torch.float32), 2, 7
    given = inputs(kv, n, 16)
    contiguous = fill(ops, kv, given, n)  # [2 L, BATCH, Hkv, S, Dh]
    slots = contiguous.shape[3]
    per_row = -(-slots // page)
    pages = torch.randperm(BATCH * per_row, generator=torch.Generator().manual_seed(0)).view(BATCH, per_row)
    keys, values = (
        [torch.full((BATCH * per_row, kv.heads, page, kv.head_size), UNTOUCHED) for _ in range(LAYERS)]
        for _ in range(2)
    )
    at = pages[given["rows"], given["slots"] // page], given["slots"] % page
    ops.kv_fill(given["hidden"], given["from_layer"], *at, kv, KVCache(keys, values), rotary=given["rotary"])
    paged = torch.stack(keys + values)[:, pages].transpose(3, 2).flatten(3, 4)[:, :, :, :slots]
    assert torch.equal(paged, contiguous)


def test_hidden_may_be_wider_than_the_weights(backend):
    kv = stack(torch.bfloat16)
    given = inputs(kv, 3, 16, hidden=torch.float32)
    exact = fill(reference, kv, given | {"hidden": given["hidden"].double()}, 3, torch.float64)
    assert_close(fill(ops, kv, given, 3), exact, kv)


BAD = {
    "hidden must have shape": lambda a: a | {"hidden": a["hidden"][:, :-1]},
    "hidden must be float32": lambda a: a | {"hidden": a["hidden"].double()},
    "unit stride along D": lambda a: a | {"hidden": a["hidden"].t().contiguous().t()},
    "from_layer must lie in 0..3": lambda a: a | {"from_layer": a["from_layer"] + 4},
    r"from_layer must be \[4\] int64": lambda a: a | {"from_layer": a["from_layer"].int()},
    "from_layer must be on cpu": lambda a: a | {"from_layer": a["from_layer"].to("meta")},
    "slots must be on cpu like the stack, got meta": lambda a: a | {"slots": a["slots"].to("meta")},
    "sin must be on cpu": lambda a: a | {"rotary": (a["rotary"][0], a["rotary"][1].to("meta"))},
    "hidden must be .* on cpu like the stack, got .* on meta": lambda a: a | {"hidden": a["hidden"].to("meta")},
    r"rows must be \[4\]": lambda a: a | {"rows": a["rows"][:2]},
    "got row 5": lambda a: a | {"rows": torch.tensor([0, 1, 2, 5])},
    "slot 9": lambda a: a | {"slots": torch.tensor([9, 0, 1, 1])},
    "at most once": lambda a: a | {"slots": torch.zeros_like(a["slots"]), "rows": torch.zeros_like(a["rows"])},
    "cos must have shape": lambda a: a | {"rotary": (a["rotary"][0][:, :3], a["rotary"][1])},
    "sin must have shape": lambda a: a | {"rotary": (a["rotary"][0], a["rotary"][1][:2])},
    "rotary must be one": lambda a: a | {"rotary": [a["rotary"]] * 2},
    "until must lie": lambda a: a | {"until": 4},
    "a cache that fits": lambda a: a | {"cache": KVCache(a["cache"].keys[:2], a["cache"].values[:2])},
    "a cache that fits KVStack": lambda a: a | {"cache": KVCache(*([t.half() for t in a["cache"].keys],) * 2)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_gets_one_sentence_before_anything_is_written(sentence):
    kv = stack(torch.float32)
    keys, values = ([torch.full((BATCH, 2, 3, 16), UNTOUCHED) for _ in range(LAYERS)] for _ in range(2))
    given = inputs(kv, 4, 16) | dict(cache=KVCache(keys, values))
    given["from_layer"][:] = 1
    bad = BAD[sentence](dict(given))
    places = (bad.pop(name) for name in ("hidden", "from_layer", "rows", "slots"))
    with pytest.raises((ValueError, TypeError), match=f"^kv_fill: .*{sentence}[^\n]*$"):
        ops.kv_fill(*places, kv, bad.pop("cache"), **bad)
    assert all((t == UNTOUCHED).all() for t in (*keys, *values))


@pytest.mark.parametrize(
    "sentence,keys,values",
    [
        ("as many keys as values, got 0 and 0", [], []),
        ("as many keys as values", [torch.ones(1, 1, 2, 4)], []),
        (r"keys must have shape \[B, Hkv, S, Dh\]", [torch.ones(1, 2, 4)], [torch.ones(1, 2, 4)]),
        (r"values of layer 0 must have shape \[1, 1, 2, 4\]", [torch.ones(1, 1, 2, 4)], [torch.ones(1, 2, 2, 4)]),
        ("values of layer 0 must be torch.float32", [torch.ones(1, 1, 2, 4)], [torch.ones(1, 1, 2, 4).half()]),
        ("unit stride along Dh", [torch.ones(1, 1, 4, 4).mT], [torch.ones(1, 1, 4, 4)]),
    ],
)
def test_bad_caches_get_one_sentence(sentence, keys, values):
    with pytest.raises((ValueError, TypeError), match=f"^KVCache: .*{sentence}"):
        KVCache(keys, values)


@pytest.mark.parametrize(
    "sentence,layers,facts",
    [
        ("at least one layer", [], {}),
        ("norm must be None", [KVLayer(torch.ones(1, 2, 4), torch.ones(1, 2, 4))], dict(norm="batch")),
        (r"key must have shape \[Hkv", [KVLayer(torch.ones(2, 4), torch.ones(2, 4))], {}),
        ("value of layer 0 must have shape", [KVLayer(torch.ones(1, 2, 4), torch.ones(1, 3, 4))], {}),
        ("value of layer 0 must be torch.float32", [KVLayer(torch.ones(1, 2, 4), torch.ones(1, 2, 4).half())], {}),
        ("must be float32, bfloat16 or float16", [KVLayer(torch.ones(1, 2, 4).int(), torch.ones(1, 2, 4))], {}),
        ("unit stride", [KVLayer(torch.ones(1, 4, 4).mT, torch.ones(1, 4, 4))], {}),
        ("packed needs weights on cpu", [KVLayer(*(torch.ones(1, 2, 4, device="meta"),) * 2)], dict(packed=True)),
        ("key_norm weight exactly", [KVLayer(torch.ones(1, 2, 4), torch.ones(1, 2, 4))], dict(key_norm="rms")),
    ],
)
def test_bad_stacks_get_one_sentence(sentence, layers, facts):
    with pytest.raises((ValueError, TypeError), match=f"^KVStack: .*{sentence}"):
        KVStack(layers, **facts)
