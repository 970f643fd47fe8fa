"""Inputs of ragged_attention, and what its result is held to."""

from __future__ import annotations

import torch

from exeunt import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def laid_out(shape, dtype, g, layout="plain"):
    """[B, Hkv, S, D] of random values: contiguous, a narrowed view of a longer cache, or heads inside of slots."""
    b, h, s, d = shape
    if layout == "narrowed":
        return torch.randn(b, h, s + 5, d, generator=g).to(dtype)[:, :, :s]
    if layout == "slots first":
        return torch.randn(b, s, h, d, generator=g).to(dtype).transpose(1, 2)
    return torch.randn(shape, generator=g).to(dtype)


def inputs(dtype=torch.float32, lengths=(9,), queries=(1,), heads=4, kv_heads=2, size=16, value_size=None, start=None,
           rows=None, seed=0, layout="plain", page=None, **options):  # fmt: skip
    """(positional, keyword) arguments of the op. With `page`, keys and values are dealt out to pages at random."""
    g = torch.Generator().manual_seed(seed)
    rows = list(range(len(lengths))) if rows is None else rows
    held, room, value_size = max(rows, default=0) + 2, max(lengths, default=0) + 3, value_size or size
    if page:
        columns = -(-room // page)
        pages = torch.randperm(held * columns + 2, generator=g)[: held * columns].view(held, columns).int()
        options["pages"] = pages
        shape = held * columns + 2, kv_heads, page
    else:
        shape = held, kv_heads, room
    keys, values = laid_out((*shape, size), dtype, g, layout), laid_out((*shape, value_size), dtype, g, layout)
    bounds = torch.tensor([0, *queries]).cumsum(0)
    q = torch.randn(sum(queries), heads, size, generator=g).to(dtype)
    for name, make in (("alibi", lambda: 0.1 * torch.rand(heads, generator=g)),
                       ("bias", lambda: torch.randn(sum(queries), heads, room, generator=g)),
                       ("positions", lambda: torch.randint(-1, room, (sum(queries),), generator=g))):  # fmt: skip
        if options.get(name) is True:
            options[name] = make()
    if start is not None:
        options["kv_start"] = torch.tensor(start)
    return (q, keys, values, bounds, torch.tensor(rows, dtype=torch.int64),
            torch.tensor(lengths, dtype=torch.int64)), options  # fmt: skip


def exact(args, options):
    """The specification in float64."""
    wide = [t.double() for t in args[:3]]
    return reference.ragged_attention(*wide, *args[3:], **options)


def assert_close(got, args, options):
    """Contract 6: within a few roundings of the dtype, of float32 sums for float32."""
    want, dtype = exact(args, options), args[0].dtype
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
