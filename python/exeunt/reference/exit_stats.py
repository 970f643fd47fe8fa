"""exit_stats in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.stats import ExitStats


def exit_stats(
    hidden: Tensor,
    head: Tensor,
    *,
    head_bias: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    columns: Tensor | None = None,
    target: Tensor | None = None,
    topk: int = 0,
    seeds: Tensor | None = None,
    entropy: bool = True,
    logits_out: Tensor | None = None,
) -> ExitStats:
    """Specification of :func:`exeunt.ops.exit_stats`, with the same arguments.

    It computes in float64 where ``hidden`` is float64 and in float32 otherwise, and its statistics have that dtype. The
    normalised row is rounded to the head's dtype, once, as the model's own norm would hand it to the head.
    It materialises the [N, V] logits, and gradients flow through it.

    Examples
    --------
    >>> import torch, exeunt
    >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    >>> exeunt.reference.exit_stats(hidden, head).argmax
    tensor([0, 1])
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    picked = hidden if rows is None else hidden[rows.long()]
    live = None
    if count is not None:
        live = torch.arange(len(picked), device=hidden.device) < count.reshape(())
    x = normalised(picked.to(dtype), norm, norm_weight, norm_bias, eps, head.dtype)
    if columns is not None:
        head = head[columns]
        head_bias = None if head_bias is None else head_bias[columns]
    raw = F.linear(x, head.to(dtype), cast(head_bias))
    if logits_out is not None:
        at = torch.arange(len(hidden), device=hidden.device) if rows is None else rows.long()
        chosen = slice(None) if live is None else live
        logits_out[at[chosen]] = raw[chosen].to(logits_out.dtype)
    z = scale * raw
    if softcap is not None:
        z = torch.where(raw.isinf(), z, softcap * torch.tanh(z / softcap))  # infinite: it is to flag its row
    z = z / temperature
    if live is not None:
        z = torch.where(live[:, None], z, torch.full_like(z, torch.nan))
    stats = ExitStats.from_logits(z)
    flagged = stats.argmax < 0
    ids = torch.arange(z.shape[1], device=z.device) if columns is None else columns

    def named(position: Tensor) -> Tensor:
        return torch.where(position < 0, -1, ids[position.clamp_min(0)])

    stats = stats._replace(argmax=named(stats.argmax))
    if not entropy:
        stats = stats._replace(weighted=torch.full_like(stats.weighted, torch.nan))
    if target is not None:
        chosen = z.gather(1, target[:, None])[:, 0]
        stats = stats._replace(target=torch.where(flagged, torch.nan, chosen))
    if topk:
        stats = stats._replace(**_largest(z, topk, flagged, named))
    if seeds is not None:
        # in float64 whatever the dtype: the noise is a function of (seed, id) alone
        drawn = (z.double() + gumbel(seeds, ids)).argmax(-1)
        stats = stats._replace(sample=named(torch.where(flagged, -1, drawn)))
    return stats


def normalised(
    x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float, narrow: torch.dtype
) -> Tensor:
    """Rows after their norm, rounded once to ``narrow``, the dtype of the weight that they will meet.

    Examples
    --------
    >>> normalised(torch.tensor([[3.0, 4.0]]), "rms", None, None, 0.0, torch.float32)
    tensor([[0.8485, 1.1314]])
    """
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x.to(narrow).to(x.dtype) if narrow in (torch.bfloat16, torch.float16) else x


def _largest(z: Tensor, k: int, flagged: Tensor, named: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The k largest logits, ties by position; -inf and -1 where there are not that many."""
    order = z.argsort(dim=-1, descending=True, stable=True)[:, :k]
    logits = z.gather(1, order)
    missing = k - order.shape[1]
    logits, order = F.pad(logits, (0, missing), value=-torch.inf), F.pad(order, (0, missing), value=-1)
    order = torch.where(logits > -torch.inf, order, -1)
    return {
        "topk_logits": torch.where(flagged[:, None], torch.nan, logits),
        "topk_ids": named(torch.where(flagged[:, None], -1, order)),
    }


def gumbel(seeds: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise [M, V] of (row seed, vocabulary id): first word of Philox4x32-10, counter id (Salmon et al., 2011).

    Examples
    --------
    >>> gumbel(torch.tensor([7]), torch.tensor([0, 1])).shape
    torch.Size([1, 2])
    """
    mask = 0xFFFFFFFF
    key0, key1 = seeds[:, None] & mask, (seeds[:, None] >> 32) & mask
    c0 = ids[None, :] & mask
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    u = (c0.double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
