"""exit_stats in plain torch."""

from __future__ import annotations

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
    x = picked.to(dtype)
    if norm == "rms":
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    elif norm == "layer":
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        x = x * norm_weight.to(dtype)
    if norm_bias is not None:
        x = x + norm_bias.to(dtype)
    if head.dtype in (torch.bfloat16, torch.float16):
        x = x.to(head.dtype).to(dtype)  # what the model's own norm hands to its head
    raw = F.linear(x, head.to(dtype), cast(head_bias))
    if logits_out is not None:
        at = torch.arange(len(hidden), device=hidden.device) if rows is None else rows.long()
        chosen = slice(None) if live is None else live
        logits_out[at[chosen]] = raw[chosen].to(logits_out.dtype)
    z = scale * raw
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if live is not None:
        z = torch.where(live[:, None], z, torch.full_like(z, torch.nan))
    return ExitStats.from_logits(z)
