"""ragged_attention: few queries, long keys, every row its own length and depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exeunt.ops import _backend, _library

_SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor q_indptr, Tensor rows, Tensor kv_len, Tensor? kv_start, "
    "Tensor? positions, bool causal, SymInt? window, float? softcap, float? scale, Tensor? alibi, Tensor? bias, "
    "Tensor? pages, Tensor? count) -> Tensor"
)
_INTEGERS = (torch.int64, torch.int32)


def ragged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_indptr: Tensor,
    rows: Tensor,
    kv_len: Tensor,
    *,
    kv_start: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    pages: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Attention of some rows of a cache, each with its own queries over its own range of keys.

    ``softmax(softcap * tanh(scale * q k / softcap) + alibi * (k - position) + bias) v``. Rows are listed by index, so
    the cache is neither gathered nor padded, and there is no mask tensor: entry r reads the keys
    ``kv_start[r] <= k < kv_len[r]`` of cache row ``rows[r]`` and no others. Every key is read once for all queries and
    heads that share it.

    Parameters
    ----------
    q : Tensor
        [T, Hq, Dh] float32, bfloat16 or float16, unit stride along Dh: the queries of all entries, one after another.
    k_cache, v_cache : Tensor
        [B, Hkv, S, Dh] and [B, Hkv, S, Dv] of the same dtype, any strides with unit stride along the last dimension;
        Hkv divides Hq. With ``pages``, [P, Hkv, page, Dh] and [P, Hkv, page, Dv].
    q_indptr : Tensor
        [R+1] int64 or int32, from 0 to T: entry r has the queries ``q_indptr[r]`` up to ``q_indptr[r + 1]``.
    rows : Tensor
        [R] int64 or int32, row of the cache (or of ``pages``) that each entry reads. A row may be listed twice.
    kv_len : Tensor
        [R] int64 or int32, keys of each row: one past the last key's index.
    kv_start : Tensor, optional
        [R] int64 or int32, index of the first key, by default 0: left padding.
    positions : Tensor, optional
        [T] int64 or int32, index in the cache that each query stands at. By default an entry's m queries are its last
        ones: ``kv_len[r] - m`` to ``kv_len[r] - 1``.
    causal : bool, default True
        Whether a query sees only keys up to its own position.
    window : int, optional
        Of those only the last ``window``: position - k < window. Not without ``causal``.
    softcap : float, optional
        Positive bound of the scores, by tanh (Gemma 2).
    scale : float, optional
        Factor on the scores, by default Dh**-0.5.
    alibi : Tensor, optional
        [Hq] float32 slopes: slope * (k - position) is added. Bloom, Falcon and MPT add slope * (k - another origin),
        the same up to a constant of the query, which softmax cancels; Falcon's slope is to be multiplied by ``scale``.
    bias : Tensor, optional
        [T, Hq, K] float32 or the dtype of ``q``, any strides (0 to share it), K at least the largest ``kv_len``: added
        to the scores; index k is that of the key in the cache (T5). -inf hides a key.
    pages : Tensor, optional
        [rows, n] int32, the page of every ``page`` keys of a row; entries past a row's keys are not read.
    count : Tensor, optional
        One integer on the device: only the first ``count`` entries are active; the output of the others is zero.

    Returns
    -------
    Tensor
        [T, Hq, Dv] in the dtype of ``q``. Queries that see no key give zeros.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came, before any kernel runs.
    RuntimeError
        If ``q`` requires a gradient while gradients are recorded: there is none.

    Notes
    -----
    Online softmax (Milakov and Gimelshein 2018) over blocks of keys, split over keys as in Flash-Decoding (Dao et al.
    2023), in chunks counted from ``kv_start`` and merged in order: an entry has the same bits in any batch, at any
    left padding, with any number of threads. Sums are float32.

    On CUDA lists are read on the device, so that a captured graph follows them, and nobody can refuse what they say:
    an entry that names a row, keys or a page that are not there becomes NaN, everything if ``q_indptr`` does not rise
    from 0 to T; ``count`` is cut to 0..R. Heads wider than 256 are left to plain torch there.

    Examples
    --------
    >>> import torch, exeunt
    >>> keys, values = torch.randn(4, 2, 100, 64), torch.randn(4, 2, 100, 64)
    >>> rows, lengths = torch.tensor([3, 0]), torch.tensor([70, 12])  # two of four rows decode a token each
    >>> q, q_indptr = torch.randn(2, 8, 64), torch.arange(3)
    >>> exeunt.ops.ragged_attention(q, keys, values, q_indptr, rows, lengths).shape
    torch.Size([2, 8, 64])
    """
    args = (q, k_cache, v_cache, q_indptr, rows, kv_len, kv_start, positions, causal, window, softcap, scale, alibi,
            bias, pages, count)  # fmt: skip
    if _backend.direct(q, k_cache) and not (q.requires_grad and torch.is_grad_enabled()):
        return _forward(*args)
    return torch.ops.exeunt.ragged_attention(*args)


def _forward(*args: Any) -> Tensor:
    """The op for every device."""
    _check(*args)
    kernels = _backend.kernels(args[0].device)
    if kernels is None:
        return _fallback("ragged_attention", *args)
    if args[0].is_cuda and max(args[0].shape[2], args[2].shape[3]) > kernels.largest_head:
        return _fallback(f"ragged_attention with heads of more than {kernels.largest_head}", *args)
    return _kernel(kernels, *args)


def _kernel(
    kernels: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, q_indptr: Tensor, rows: Tensor, kv_len: Tensor,
    kv_start: Tensor | None, positions: Tensor | None, causal: bool, window: int | None, softcap: float | None,
    scale: float | None, alibi: Tensor | None, bias: Tensor | None, pages: Tensor | None, count: Tensor | None,
) -> Tensor:  # fmt: skip
    """A kernel. The CPU's checks what the lists say before it writes anything; on CUDA entries whose lists name what is
    not there become NaN."""
    (tokens, heads, size), (held, kv_heads, slots, value_size) = q.shape, v_cache.shape
    out = torch.empty(tokens, heads, value_size, dtype=q.dtype, device=q.device)
    q_indptr, rows, kv_len = _list(q_indptr), _list(rows), _list(kv_len)  # type: ignore[assignment]
    kv_start, positions = _list(kv_start), _list(positions)
    alibi = None if alibi is None else alibi.contiguous()
    entries, place = rows.shape[0], _backend.place(q.device)
    room = slots if pages is None else slots * pages.shape[1]
    if q.is_cpu:
        space = _backend.scratch(kernels.ragged_attention_workspace(tokens, heads, room, size, value_size, *place))
    else:
        need = kernels.ragged_attention_workspace(tokens, heads, kv_heads, entries, room, value_size)
        space = torch.empty(need, dtype=torch.uint8, device=q.device)
    kernels.ragged_attention(
        (q.data_ptr(), *q.stride()), (k_cache.data_ptr(), *k_cache.stride()[:3]),
        (v_cache.data_ptr(), *v_cache.stride()[:3]), _backend.DTYPES[q.dtype],
        (tokens, heads, kv_heads, size, value_size, held, slots), q_indptr.data_ptr(), rows.data_ptr(),
        kv_len.data_ptr(), _backend.pointer(kv_start), _backend.pointer(positions), entries,
        _backend.pointer(count), count is not None and count.dtype == torch.int64, causal, window or 0,
        softcap or 0.0, size**-0.5 if scale is None else scale, _backend.pointer(alibi),
        (0, 0, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride()),
        0 if bias is None else _backend.DTYPES[bias.dtype], -1 if bias is None else bias.shape[2],
        (0, 0, 0, 0) if pages is None else (pages.data_ptr(), *pages.stride(), 0),
        *((0, -1) if pages is None else pages.shape), out.data_ptr(), space.data_ptr(), *place,
    )  # fmt: skip
    return out


def _list(t: Tensor | None) -> Tensor | None:
    """A list as the kernel reads it."""
    return t if t is None or (t.dtype == torch.int64 and t.is_contiguous()) else t.long().contiguous()


def _fallback(what: str, *args: Any) -> Tensor:
    """The reference, where there is no kernel."""
    from exeunt import reference

    if args[0].is_cpu:
        _check_lists(args[0], *args[1:8], *args[13:])
    _backend.warn_fallback(what, args[0].device)
    names = ("kv_start", "positions", "causal", "window", "softcap", "scale", "alibi", "bias", "pages", "count")
    return reference.ragged_attention(*args[:6], **dict(zip(names, args[6:], strict=True)))


def _fake(*args: Any) -> Tensor:
    _check(*args)
    q, v_cache = args[0], args[2]
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, q_indptr: Tensor, rows: Tensor, kv_len: Tensor,
    kv_start: Tensor | None, positions: Tensor | None, causal: bool, window: int | None, softcap: float | None,
    scale: float | None, alibi: Tensor | None, bias: Tensor | None, pages: Tensor | None, count: Tensor | None,
) -> None:  # fmt: skip
    """Raise for shapes, dtypes, strides and options that do not fit; what the lists say is checked where it is read."""
    if q.dtype not in _backend.DTYPES:
        raise TypeError(f"ragged_attention: q must be float32, bfloat16 or float16, got {q.dtype}")
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        raise ValueError(
            "ragged_attention: expected q [T, Hq, Dh], k_cache [B, Hkv, S, Dh] and v_cache [B, Hkv, S, Dv], got "
            f"{[*q.shape]}, {[*k_cache.shape]} and {[*v_cache.shape]}"
        )
    (total, heads, size), shape = q.shape, k_cache.shape
    if shape[3] != size or v_cache.shape[:3] != shape[:3] or not size or not v_cache.shape[3]:
        raise ValueError(
            f"ragged_attention: expected k_cache [B, Hkv, S, {size}] and v_cache [B, Hkv, S, Dv] that go with q, got "
            f"{[*shape]} and {[*v_cache.shape]}"
        )
    if not shape[1] or heads % shape[1]:
        raise ValueError(f"ragged_attention: key heads must divide the {heads} heads of q, got {shape[1]}")
    if not causal and window is not None:
        raise ValueError(f"ragged_attention: window needs causal=True, got window={window} and causal=False")
    if window is not None and window < 1:
        raise ValueError(f"ragged_attention: window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"ragged_attention: softcap must be positive, got {softcap}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != q.dtype:
            raise TypeError(f"ragged_attention: {name} must be {q.dtype} like q, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"ragged_attention: {name} must be on {q.device} like q, got {t.device}")
        if t.stride(3) != 1:
            raise ValueError(f"ragged_attention: {name} must have unit stride along its last dimension")
    if size > 1 and q.stride(2) != 1:
        raise ValueError("ragged_attention: q must have unit stride along Dh")
    entries = rows.shape[0] if rows.dim() == 1 else -1
    _check_list("rows", rows, entries, q)
    _check_list("q_indptr", q_indptr, entries + 1, q)
    _check_list("kv_len", kv_len, entries, q)
    if kv_start is not None:
        _check_list("kv_start", kv_start, entries, q)
    if positions is not None:
        _check_list("positions", positions, total, q)
    if alibi is not None and (alibi.shape != (heads,) or alibi.dtype != torch.float32 or alibi.device != q.device):
        raise ValueError(
            f"ragged_attention: alibi must be [{heads}] float32 on {q.device}, got {[*alibi.shape]} {alibi.dtype}"
        )
    if bias is not None:
        if bias.dim() != 3 or bias.shape[:2] != (total, heads) or bias.device != q.device:
            raise ValueError(
                f"ragged_attention: bias must be [{total}, {heads}, K] on {q.device}, got {[*bias.shape]} on "
                f"{bias.device}"
            )
        if bias.dtype not in (torch.float32, q.dtype):
            raise TypeError(f"ragged_attention: bias must be float32 or {q.dtype}, got {bias.dtype}")
    if pages is not None and (pages.dim() != 2 or pages.dtype != torch.int32 or pages.device != q.device):
        raise ValueError(f"ragged_attention: pages must be [rows, n] int32 on {q.device}, got {[*pages.shape]} "
                         f"{pages.dtype}")  # fmt: skip
    if count is not None and (count.numel() != 1 or count.dtype not in _INTEGERS or count.device != q.device):
        raise ValueError(f"ragged_attention: count must be one int32 or int64 on {q.device}, got {[*count.shape]} "
                         f"{count.dtype}")  # fmt: skip


def _check_list(name: str, t: Tensor, size: int, q: Tensor) -> None:
    if t.shape != (size,) or t.dtype not in _INTEGERS or t.device != q.device:
        wanted = "[R]" if size < 0 else f"[{size}]"
        raise ValueError(
            f"ragged_attention: {name} must be {wanted} int64 or int32 on {q.device}, got {[*t.shape]} {t.dtype} on "
            f"{t.device}"
        )


def _check_lists(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, q_indptr: Tensor, rows: Tensor, kv_len: Tensor,
    kv_start: Tensor | None, positions: Tensor | None, bias: Tensor | None, pages: Tensor | None,
    count: Tensor | None,
) -> None:  # fmt: skip
    """Raise where a list names what is not there."""
    bounds, entries = q_indptr.tolist(), rows.shape[0]
    if bounds[0] != 0 or bounds[-1] != len(q) or sorted(bounds) != bounds:
        raise ValueError(f"ragged_attention: q_indptr must rise from 0 to {len(q)}, got {bounds}")
    live = entries if count is None else int(count)
    if not 0 <= live <= entries:
        raise ValueError(f"ragged_attention: count must lie in 0..{entries}, got {live}")
    table = k_cache if pages is None else pages
    room = k_cache.shape[2] if pages is None else k_cache.shape[2] * pages.shape[1]
    starts = [0] * entries if kv_start is None else kv_start.tolist()
    for r, (row, start, stop) in enumerate(zip(rows.tolist()[:live], starts, kv_len.tolist(), strict=False)):
        if not 0 <= row < len(table):
            raise ValueError(f"ragged_attention: rows must lie in 0..{len(table) - 1}, got {row} at {r}")
        if not 0 <= stop <= room:
            raise ValueError(f"ragged_attention: kv_len must lie in 0..{room}, the keys of a row, got {stop} at {r}")
        if not 0 <= start <= stop:
            raise ValueError(f"ragged_attention: kv_start must lie in 0..kv_len ({stop}), got {start} at {r}")
        if bias is not None and bounds[r] < bounds[r + 1] and stop > bias.shape[2]:
            raise ValueError(f"ragged_attention: bias must reach over {stop} keys, got {bias.shape[2]}")
        if pages is not None and start < stop:
            used = pages[row, start // k_cache.shape[2] : (stop - 1) // k_cache.shape[2] + 1].tolist()
            if min(used) < 0 or max(used) >= len(k_cache):
                raise ValueError(f"ragged_attention: pages must lie in 0..{len(k_cache) - 1}, got {used} of row {row}")


_library.define("ragged_attention", _SCHEMA, _forward, _fake)
