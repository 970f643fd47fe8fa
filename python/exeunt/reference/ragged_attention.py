"""ragged_attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Specification of :func:`exeunt.ops.ragged_attention`, with the same arguments.

    It computes in float64 where ``q`` is float64 and in float32 otherwise; gradients flow through it.

    Examples
    --------
    >>> import torch, exeunt
    >>> keys, values = torch.zeros(1, 1, 4, 2), torch.arange(4.0).view(1, 1, 4, 1)
    >>> exeunt.reference.ragged_attention(torch.ones(2, 1, 2), keys, values, torch.tensor([0, 2]), torch.tensor([0]),
    ...                                   torch.tensor([3])).flatten()  # the means of values 0..1 and 0..2
    tensor([0.5000, 1.0000])
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k_cache.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds, lengths = q_indptr.tolist(), kv_len.tolist()
    starts = [0] * len(lengths) if kv_start is None else kv_start.tolist()
    live = len(lengths) if count is None else int(count)
    out = []
    for r, row in enumerate(rows.tolist()):
        begin, end, start, stop = bounds[r], bounds[r + 1], starts[r], lengths[r]
        if r >= live:
            out.append(q.new_zeros(end - begin, q.shape[1], v_cache.shape[3]))
            continue
        keys, values = (_of_row(t, row, start, stop, pages).to(dtype) for t in (k_cache, v_cache))
        at = torch.arange(start, stop, device=q.device)
        if positions is None:
            position = torch.arange(stop - (end - begin), stop, device=q.device)
        else:
            position = positions[begin:end]
        score = torch.einsum("mhgd,hkd->mhgk", q[begin:end].to(dtype).unflatten(1, (-1, group)), keys) * scale
        score = score.flatten(1, 2)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        distance = at - position[:, None]  # [m, k]
        if alibi is not None:
            score = score + alibi.to(dtype)[:, None] * distance[:, None]
        if bias is not None:
            score = score + bias[begin:end, :, start:stop].to(dtype)
        if causal:
            hidden = distance > 0 if window is None else (distance > 0) | (distance <= -window)
            score = score.masked_fill(hidden[:, None], -torch.inf)
        # A query that sees nothing gives zeros, and has no NaN on its way back either.
        blind = (score == -torch.inf).all(-1, keepdim=True)
        weight = score.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        mixed = torch.einsum("mhgk,hkd->mhgd", weight.unflatten(1, (-1, group)), values)
        out.append(mixed.flatten(1, 2).to(q.dtype))
    return torch.cat(out) if out else q.new_zeros(0, q.shape[1], v_cache.shape[3])


def _of_row(cache: Tensor, row: int, start: int, stop: int, pages: Tensor | None) -> Tensor:
    """Keys or values [Hkv, stop - start, Dh] of one row."""
    if pages is None:
        return cache[row, :, start:stop]
    at = torch.arange(start, stop, device=cache.device)
    page = pages[row].long()[at // cache.shape[2]]
    return cache[page, :, at % cache.shape[2]].transpose(0, 1)
