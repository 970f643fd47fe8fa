"""compact and expand in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def compact(mask: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Specification of :func:`exeunt.ops.compact`, with the same arguments.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.reference.compact(torch.tensor([False, True, True]))
    (tensor([1, 2, 0]), tensor(2))
    """
    rows = torch.cat((mask.nonzero(), (~mask).nonzero())).flatten()
    return rows, mask.sum(), *(tree_map(lambda t: t[rows] if isinstance(t, Tensor) else t, x) for x in tensors)


def expand(rows: Tensor, count: Tensor, compacted: Tensor, into: Tensor) -> Tensor:
    """Specification of :func:`exeunt.ops.expand`, with the same arguments.

    Examples
    --------
    >>> import torch, exeunt
    >>> rows, count = torch.tensor([1, 2, 0]), torch.tensor(2)
    >>> exeunt.reference.expand(rows, count, torch.tensor([5, 6, 7]), torch.tensor([0, 0, 0]))
    tensor([0, 5, 6])
    """
    n = int(count)
    out = into.clone()
    out[rows[:n]] = compacted[:n]
    return out
