"""What one pass over the head leaves per row, and the measures that derive from it.

The Python twin of ``csrc/core/exit_stats.h``: pure torch, so that the reference can use it too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ExitStats"]


class ExitStats(NamedTuple):
    """Statistics of N rows of logits z, in a shifted form in which nothing cancels.

    A row whose logits hold NaN or +inf, or no finite value at all, is *flagged*: ``argmax`` is -1 and everything
    else NaN, so that no comparison lets it exit.

    Attributes
    ----------
    argmax : Tensor
        [N] int64, index of the largest logit; ties go to the lowest index.
    top1, top2 : Tensor
        [N] float, the two largest logits; ``top2`` is -inf for a vocabulary of one.
    sumexp : Tensor
        [N] float, sum of exp(z - top1); at least 1.
    weighted : Tensor
        [N] float, sum of (z - top1) exp(z - top1); at most 0.
    target : Tensor, optional
        [N] float, the logit of an asked id; None unless asked for, as the following.
    topk_logits, topk_ids : Tensor, optional
        [N, k] float and int64, the k largest logits, largest first, ties by the lowest index; where fewer are
        finite the rest are -inf and -1.
    sample : Tensor, optional
        [N] int64, a draw from the row's softmax.

    Examples
    --------
    >>> import torch, exeunt
    >>> stats = exeunt.ExitStats.from_logits(torch.tensor([[0.0, 2.0, 0.0]]))
    >>> int(stats.argmax), round(float(stats.max_prob), 3), round(float(stats.entropy), 3)
    (1, 0.787, 0.666)
    """

    argmax: Tensor
    top1: Tensor
    top2: Tensor
    sumexp: Tensor
    weighted: Tensor
    target: Tensor | None = None
    topk_logits: Tensor | None = None
    topk_ids: Tensor | None = None
    sample: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor) -> ExitStats:
        """Statistics of logits [N, V] in their own floating dtype; differentiable.

        Examples
        --------
        >>> ExitStats.from_logits(torch.zeros(2, 4)).sumexp
        tensor([4., 4.])
        """
        rows, vocab = logits.shape
        usable = ~(torch.isnan(logits) | torch.isposinf(logits)).any(-1) & torch.isfinite(logits).any(-1)
        z = torch.where(usable[:, None], logits, torch.zeros_like(logits))
        top1, argmax = z.max(-1)
        argmax = (z == top1[:, None]).to(torch.int8).argmax(-1)  # the lowest index among equals, on every device
        others = z.masked_fill(torch.arange(vocab, device=z.device) == argmax[:, None], -math.inf)
        top2 = others.max(-1).values
        shifted = z - top1[:, None]
        e = shifted.exp()
        weighted = torch.where(e > 0, shifted, torch.zeros_like(shifted)) * e
        nan = torch.full((rows,), math.nan, dtype=z.dtype, device=z.device)
        floats = [torch.where(usable, s, nan) for s in (top1, top2, e.sum(-1), weighted.sum(-1))]
        return cls(torch.where(usable, argmax, torch.full_like(argmax, -1)), *floats)

    @property
    def max_prob(self) -> Tensor:
        """[N] probability of ``argmax``, in (0, 1]."""
        return 1.0 / self.sumexp

    @property
    def margin(self) -> Tensor:
        """[N] difference of the two largest probabilities, in [0, 1] (CALM's softmax response)."""
        return -torch.expm1(self.top2 - self.top1) / self.sumexp

    @property
    def entropy(self) -> Tensor:
        """[N] entropy of the softmax in nats, in [0, log V]."""
        return (torch.log(self.sumexp) - self.weighted / self.sumexp).clamp_min(0.0)

    def normalized_entropy(self, classes: int) -> Tensor:
        """[N] entropy divided by log(classes), in [0, 1] (FastBERT's uncertainty).

        Examples
        --------
        >>> ExitStats.from_logits(torch.zeros(1, 8)).normalized_entropy(8)
        tensor([1.])
        """
        if classes < 2:
            raise ValueError(f"normalized_entropy: classes must be at least 2, got {classes}")
        return self.entropy / math.log(classes)

    @property
    def logsumexp(self) -> Tensor:
        """[N] log of the softmax denominator."""
        return self.top1 + torch.log(self.sumexp)
