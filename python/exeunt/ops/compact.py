"""compact and expand: rows of a batch that go on together, and back to their places.

Both are a handful of torch ops, on CPU as fast as the calls into a kernel of their own would be (a stable sort of the
mask takes 6 us up to some hundred rows), and they trace, differentiate and run on every device. Neither waits for the
device: how many rows were chosen stays there, and whoever must know reads the count once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["compact", "expand"]


def compact(mask: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Move the rows where ``mask`` is True to the front, the others behind them, both in their order.

    Parameters
    ----------
    mask : Tensor
        [N] bool.
    *tensors : Tensor or nested tuples, lists and dicts of tensors
        Each [N, ...], the state of a policy for example; what is no tensor (None) passes.

    Returns
    -------
    rows : Tensor
        [N] int64, the row that each place now holds; the first ``count`` are those of the mask.
    count : Tensor
        int64 scalar on the mask's device.
    *tensors
        As given, permuted.

    Raises
    ------
    ValueError
        For a mask that is not [N] bool, or a tensor with another number of rows.

    Examples
    --------
    >>> import torch, exeunt
    >>> rows, count, x = exeunt.ops.compact(torch.tensor([False, True, True]), torch.tensor([7.0, 8.0, 9.0]))
    >>> rows, count, x
    (tensor([1, 2, 0]), tensor(2), tensor([8., 9., 7.]))
    """
    if mask.dim() != 1 or mask.dtype != torch.bool:
        raise ValueError(f"compact: mask must be [N] bool, got {[*mask.shape]} {mask.dtype}")
    rows = (~mask).argsort(stable=True)

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0 or x.shape[0] != mask.shape[0]:
            raise ValueError(f"compact: expected tensors of {mask.shape[0]} rows like the mask, got {[*x.shape]}")
        return x.index_select(0, rows)

    return rows, mask.sum(), *(tree_map(move, x) for x in tensors)


def expand(rows: Tensor, count: Tensor, compacted: Tensor, into: Tensor) -> Tensor:
    """Put the first ``count`` rows of ``compacted`` back where :func:`compact` took them from.

    Parameters
    ----------
    rows, count : Tensor
        As :func:`compact` returned them.
    compacted : Tensor
        [N, ...]; rows from ``count`` on are not looked at.
    into : Tensor
        [N, ...] of the same dtype, what the other rows keep. Not changed.

    Returns
    -------
    Tensor
        [N, ...] ``into`` with the chosen rows replaced.

    Raises
    ------
    ValueError
        For shapes or dtypes that differ.

    Examples
    --------
    >>> import torch, exeunt
    >>> rows, count, x = exeunt.ops.compact(torch.tensor([False, True, True]), torch.tensor([7.0, 8.0, 9.0]))
    >>> exeunt.ops.expand(rows, count, x * 10, torch.tensor([7.0, 8.0, 9.0]))
    tensor([ 7., 80., 90.])
    """
    if (compacted.shape, compacted.dtype) != (into.shape, into.dtype) or compacted.shape[0] != rows.shape[0]:
        raise ValueError(
            f"expand: expected two tensors of one dtype with {rows.shape[0]} rows, "
            f"got {[*compacted.shape]} {compacted.dtype} and {[*into.shape]} {into.dtype}"
        )
    chosen = torch.arange(rows.shape[0], device=rows.device) < count
    chosen = chosen.reshape(-1, *(1,) * (into.dim() - 1))
    return into.index_copy(0, rows, torch.where(chosen, compacted, into.index_select(0, rows)))
