"""ragged_attention on a GPU beside one read of the keys and values, padded attention, flex_attention and FlashInfer.

`bench_cuda.py` prints the table and runs `small`. 32 heads over 8 key heads of 128 in bfloat16. "x read" is the time of
a captured graph over that of reading the keys and values that are there once, at the rate of a device copy. Other
columns are the contender's time over that of our call: above 1, exeunt is faster. SDPA takes the padded cache with a
boolean mask, made before; flex_attention, compiled, a block mask made before; FlashInfer's decoding takes pages of 64
keys, planned before, and stands beside ours over the same pages.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import functional as F

from exeunt import ops, reference

HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 64
#: Lengths of the rows, and queries of each.
CASES = {
    "64 rows of 512..8192 keys": ([512 + 7680 * ((37 * r) % 64) // 63 for r in range(64)], 1),
    "64 rows of 512..8192 keys, 8 queries each": ([512 + 7680 * ((37 * r) % 64) // 63 for r in range(64)], 8),
    "64 rows of 4096 keys": ([4096] * 64, 1),
    "one row of 32768 keys": ([32768], 1),
}
COLUMNS = ["paged", "padded SDPA", "flex_attention", "FlashInfer, paged"]


def flashinfer_over(q, keys, values, lengths):
    """FlashInfer's decoding over the same pages, planned."""
    import flashinfer

    pages = [-(-n // PAGE) for n in lengths]
    bounds = torch.tensor([0, *pages]).cumsum(0).int()
    columns = keys.shape[0] // len(lengths)
    indices = torch.cat([columns * r + torch.arange(n) for r, n in enumerate(pages)]).int().cuda()
    last = torch.tensor([(n - 1) % PAGE + 1 for n in lengths]).int()
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    wrapper.plan(bounds.cuda(), indices, last.cuda(), HEADS, KV_HEADS, SIZE, PAGE, q_data_type=q.dtype)
    return lambda: wrapper.run(q, (keys, values))


def sides_of(lengths, queries, device="cuda"):
    """The calls of a case, and the bytes of the keys and values that they are about."""
    rows, most = len(lengths), max(lengths)
    keys, values = torch.randn(2, rows, KV_HEADS, most, SIZE, device=device, dtype=torch.bfloat16)
    q = torch.randn(rows, queries, HEADS, SIZE, device=device, dtype=torch.bfloat16)
    held, listed = torch.tensor(lengths, device=device), torch.arange(rows, device=device)
    bounds = torch.arange(rows + 1, device=device) * queries
    at = held[:, None] - queries + torch.arange(queries, device=device)
    mask = (torch.arange(most, device=device) <= at[..., None])[:, None]
    flat, tall = q.flatten(0, 1), q.transpose(1, 2)
    # The same keys in pages [rows * columns, Hkv, PAGE, Dh]
    columns = -(-most // PAGE)
    paged = [F.pad(t, (0, 0, 0, columns * PAGE - most)).unflatten(2, (columns, PAGE)).transpose(1, 2).flatten(0, 1)
             .contiguous() for t in (keys, values)]  # fmt: skip
    pages = torch.arange(rows * columns, device=device, dtype=torch.int32).view(rows, columns)
    sides = {
        "ours": lambda: ops.ragged_attention(flat, keys, values, bounds, listed, held),
        "paged": lambda: ops.ragged_attention(flat, *paged, bounds, listed, held, pages=pages),
        "padded SDPA": lambda: F.scaled_dot_product_attention(tall, keys, values, attn_mask=mask, enable_gqa=True),
    }
    if importlib.util.find_spec("triton"):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b, h, i, k):
            return k <= held[b] - queries + i

        block_mask = create_block_mask(seen, rows, None, queries, most, device=device)
        flex = torch.compile(flex_attention, dynamic=False)
        sides["flex_attention"] = lambda: flex(tall, keys, values, block_mask=block_mask, enable_gqa=True)
    if importlib.util.find_spec("flashinfer") and queries == 1:
        sides["FlashInfer, paged"] = flashinfer_over(flat, *paged, lengths)
    return sides, 2 * sum(lengths) * KV_HEADS * SIZE * 2


def table(interleaved, captured):
    """Lines of the table; the two are bench_cuda's, which measure calls in turns and capture one in a graph."""
    yield (
        f"| ragged_attention, {HEADS} over {KV_HEADS} heads of {SIZE}, bf16 | ms | graph ms | x read | "
        + " | ".join(COLUMNS)
        + " |"
    )
    yield "|---" * (4 + len(COLUMNS)) + "|"
    for case, (lengths, queries) in CASES.items():
        with torch.inference_mode():
            sides, nbytes = sides_of(lengths, queries)
            got, want = sides["ours"]().view(len(lengths), queries, HEADS, SIZE), sides["padded SDPA"]().transpose(1, 2)
            torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)
            source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            read = interleaved({"copy": lambda to=target, of=source: to.copy_(of)})["copy"] / 2
            times = interleaved({**sides, "graph": captured(sides["ours"])})
        ours, graph = times["ours"], times["graph"]
        if isinstance(ours, str) or isinstance(graph, str):
            raise SystemExit(f"ragged_attention failed with {ours}, in a graph {graph}: {case}")
        cells = [times.get(name, "absent") for name in COLUMNS]
        shown = " | ".join(c if isinstance(c, str) else f"{c / ours:.2f}" for c in cells)
        yield f"| {case} | {ours:.3f} | {graph:.3f} | {graph / read:.2f} | {shown} |"
        torch.compiler.reset()


def small():
    """Each kernel once: dtypes, sizes of heads, few and many queries, one chunk and several, pages, unaligned keys."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size, extra in ((40, 0), (128, 0), (256, 0), (33, 1)):
            keys, values = torch.randn(2, 3, 2, 600, size + extra, dtype=dtype)[..., :size]
            q, bounds = torch.randn(27, 4, size, dtype=dtype), torch.tensor([0, 1, 26, 27])
            rows, held = torch.tensor([2, 0, 1]), torch.tensor([600, 90, 33])
            options = dict(kv_start=torch.tensor([0, 7, 0]), window=560)
            got = ops.ragged_attention(*(t.cuda() for t in (q, keys, values, bounds, rows, held)),
                                       kv_start=options["kv_start"].cuda(), window=560)  # fmt: skip
            want = reference.ragged_attention(q, keys, values, bounds, rows, held, **options)
            torch.testing.assert_close(got.cpu(), want, rtol=2e-2, atol=2e-2)
    pages = torch.randperm(8).int().view(2, 4).cuda()
    keys = torch.randn(8, 2, 16, 64).cuda()
    two, bounds = torch.arange(2).cuda(), torch.arange(3).cuda()
    ops.ragged_attention(keys[:2, :, 0], keys, keys, bounds, two, two + 63, pages=pages)
