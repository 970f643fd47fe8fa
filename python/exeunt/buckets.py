"""Rows of similar length run together, so that padding is not computed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cut", "lengths"]

WORTH = 96  # tokens that a split has to save: about what one more call of a layer costs


def lengths(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Tokens of each row up to its last one that counts.

    Parameters
    ----------
    mask : Tensor or None
        [B, S], not 0 where a token counts; None where all of them do.
    batch, length : int
        B and S.
    device : torch.device

    Returns
    -------
    Tensor
        [B] int64, at least 1.

    Examples
    --------
    >>> lengths(torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]), 2, 4, torch.device("cpu"))
    tensor([2, 3])
    """
    if mask is None:
        return torch.full((batch,), length, device=device)
    places = torch.arange(1, length + 1, device=mask.device)
    return ((mask != 0) * places).amax(1).clamp_min(1)


def cut(lengths: Tensor, worth: int = WORTH) -> list[Tensor]:
    """Divide rows into buckets of similar length, as long as a division saves ``worth`` tokens of padding or more.

    Parameters
    ----------
    lengths : Tensor
        [n] tokens of each row.
    worth : int, default 96

    Returns
    -------
    list of Tensor
        int64 indices of the rows of each bucket, ascending within it; together all of 0..n-1.

    Examples
    --------
    >>> cut(torch.tensor([9, 120, 10, 118]))
    [tensor([0, 2]), tensor([1, 3])]
    >>> cut(torch.tensor([9, 12, 10, 11]))
    [tensor([0, 1, 2, 3])]
    """
    ordered, order = lengths.cpu().sort(stable=True)
    parts = [p.sort().values.to(lengths.device) for p in _split(ordered, order, worth)]
    return parts


def _split(ordered: Tensor, order: Tensor, worth: int) -> list[Tensor]:
    """Halve where most is saved: the first k of n rows are padded to their own longest instead of the last one's."""
    n = len(ordered)
    if n < 2 or (n - 1) * int(ordered[-1] - ordered[0]) < worth:
        return [order]
    saved = torch.arange(1, n) * (ordered[-1] - ordered[:-1])
    most, at = saved.max(0)
    if int(most) < worth:
        return [order]
    k = int(at) + 1
    return _split(ordered[:k], order[:k], worth) + _split(ordered[k:], order[k:], worth)
