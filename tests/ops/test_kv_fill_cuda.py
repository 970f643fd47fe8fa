"""What is particular to kv_fill on CUDA, by emulation: heads in tiles, groups of layers, places that nobody checked."""

from __future__ import annotations

import pytest
import torch

import backends
from exeunt import ops, reference
from exeunt.ops import KVCache, KVLayer, KVStack, _backend

pytestmark = pytest.mark.skipif(not backends.emulated(), reason="needs a build with EXEUNT_EMULATE=ON")
UNTOUCHED = -1024.0


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    backends.patch_cpu(monkeypatch)
    return _backend.cpu.module


def stack(dtype, layers=2, heads=2, size=16, width=40, key_norm="rms", **facts):
    g = torch.Generator().manual_seed(size)

    def made(*shape, spread=1.0, at=0.0):
        return (at + spread * torch.randn(*shape, generator=g)).to(dtype)

    own = [
        KVLayer(
            made(heads, size, width, spread=width**-0.5),
            made(heads, size, width, spread=width**-0.5),
            norm_weight=made(width, spread=0.2, at=1.0),
            key_norm=made(size, spread=0.2, at=1.0) if key_norm else None,
        )
        for _ in range(layers)
    ]
    return KVStack(own, norm="rms", key_norm=key_norm, **facts)


def places(kv, n, batch=3, rotary=0, seed=1):
    g = torch.Generator().manual_seed(seed)
    keys, values = (
        [torch.full((batch, kv.heads, n // batch + 1, kv.head_size), UNTOUCHED, dtype=kv.dtype) for _ in kv.layers]
        for _ in range(2)
    )
    every = torch.arange(n)
    given = (
        torch.randn(n, kv.width, generator=g).to(kv.dtype),
        torch.randint(0, len(kv) + 1, (n,), generator=g),
        every % batch,
        every // batch,
    )
    return given, KVCache(keys, values), tuple(torch.randn(2, n, rotary, generator=g)) if rotary else None


def expected(kv, given, cache, rotary):
    """What the reference leaves, in float64."""
    wide = KVCache(
        *([torch.full_like(t, UNTOUCHED, dtype=torch.float64) for t in c] for c in (cache.keys, cache.values))
    )
    reference.kv_fill(given[0].double(), *given[1:], kv, wide, rotary=rotary)
    return wide


def assert_close(got, want):
    for a, b in zip(got.keys + got.values, want.keys + want.values, strict=True):
        assert torch.equal(a == UNTOUCHED, b == UNTOUCHED)
        eps = torch.finfo(a.dtype).eps
        straddle = 0.0 if a.dtype == torch.float32 else eps
        torch.testing.assert_close(a.double(), b, rtol=eps / 2 + 4e-6, atol=4e-6 + straddle)


@pytest.mark.parametrize("key_norm", [None, "rms", "layer"])
@pytest.mark.parametrize("size,rotary", [(33, 32), (64, 64), (80, 32), (96, 96), (128, 128), (136, 34), (256, 256)])
def test_heads_of_every_size(size, rotary, key_norm):
    """Several heads of a tile, one with warps to spare, one that takes two tiles, whose norm waits for the second."""
    for dtype, interleaved in ((torch.bfloat16, False), (torch.float32, True)):
        kv = stack(dtype, heads=3, size=size, key_norm=key_norm, interleaved=interleaved)
        given, cache, tables = places(kv, 5, rotary=rotary)
        ops.kv_fill(*given, kv, cache, rotary=tables)
        assert_close(cache, expected(kv, given, cache, tables))


def test_a_head_too_wide_for_shared_memory_is_refused_with_its_bytes():
    kv = stack(torch.float32, layers=1, heads=1, size=2048, width=8)
    given, cache, _ = places(kv, 1)
    with pytest.raises(
        RuntimeError, match=r"^kv_fill: hidden \[1, 8\], 1 layers of 1 heads of 2048, on cuda:0: .* bytes"
    ):
        ops.kv_fill(*given, kv, cache)


@pytest.mark.parametrize("n", [3, 70])
def test_more_layers_than_a_launch_takes(n):
    kv = stack(torch.float32, layers=131, heads=1, size=4, width=8, key_norm=None)
    given, cache, tables = places(kv, n, rotary=4)
    by_layer = [tables if layer % 2 else None for layer in range(131)]
    ops.kv_fill(*given, kv, cache, rotary=by_layer)
    assert_close(cache, expected(kv, given, cache, by_layer))


def test_bits_do_not_depend_on_the_schedule(emulated):
    kv = stack(torch.bfloat16, size=24, key_norm="layer")
    found = []
    for seed in (0, 1, 2):
        emulated.set_schedule(seed)
        given, cache, tables = places(kv, 20, rotary=24)
        ops.kv_fill(*given, kv, cache, rotary=tables)
        found.append(torch.stack(cache.keys + cache.values))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_outside_are_left_out():
    """On a device nobody can refuse them without waiting."""
    kv = stack(torch.float32)
    given, cache, _ = places(kv, 9)
    bad = [t.clone() for t in given]
    bad[1][0], bad[1][1] = -1, 3
    bad[2][2], bad[2][3] = -1, 3
    bad[3][4], bad[3][5] = 4, -7
    ops.kv_fill(*bad, kv, cache)
    kept = [t[6:] for t in given]
    assert_close(cache, expected(kv, kept, cache, None))


def test_layers_of_different_capacity_take_the_rows_that_fit():
    kv = stack(torch.float32)
    given, cache, _ = places(kv, 6)
    given[1][:] = 0
    short = KVCache([cache.keys[0], cache.keys[1][:, :, :1]], [cache.values[0], cache.values[1][:, :, :1]])
    ops.kv_fill(*given, kv, short)
    assert (cache.keys[0][:, :, :2] != UNTOUCHED).all() and (cache.keys[1][:, :, 1:] == UNTOUCHED).all()
    assert (cache.values[1][:, :, 0] != UNTOUCHED).all()


@pytest.mark.parametrize("offset", [0, 1])
def test_weights_that_no_16_byte_access_may_touch(offset):
    kv = stack(torch.bfloat16, heads=1, size=32, width=40)
    layers = []
    for layer in kv.layers:
        room = torch.zeros(offset + layer.value.numel(), dtype=kv.dtype)[offset:].view_as(layer.value)
        layers.append(
            KVLayer(layer.key, room.copy_(layer.value), norm_weight=layer.norm_weight, key_norm=layer.key_norm)
        )
    given, cache, _ = places(kv, 4)
    ops.kv_fill(*given, KVStack(layers, norm="rms", key_norm="rms"), cache)
    assert_close(cache, expected(kv, given, cache, None))


def test_an_error_names_the_op_and_its_shapes(monkeypatch):
    kv = stack(torch.float32)
    given, cache, _ = places(kv, 3)
    run = kv.kernel.kernel.fill
    monkeypatch.setattr(kv.kernel, "fill", lambda *args: run(*args[:-1], 7, 0))
    with pytest.raises(RuntimeError, match=r"^kv_fill: hidden \[3, 40\], 2 layers of 2 heads of 16, on cuda:7: .+"):
        ops.kv_fill(*given, kv, cache)
