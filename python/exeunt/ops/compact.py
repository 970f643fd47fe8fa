"""compact and expand: rows of a batch that go on together, and back to their places.

On CUDA each is a kernel; elsewhere, and where torch traces or records gradients, a handful of torch ops, on CPU as fast
as the calls into a kernel of their own would be (a stable sort of the mask takes 6 us up to some hundred rows). Neither
waits for the device: how many rows were chosen stays there, and whoever must know reads the count once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from exeunt.ops import _backend

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
    rows, count = _rows(mask)

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0 or x.shape[0] != mask.shape[0]:
            raise ValueError(f"compact: expected tensors of {mask.shape[0]} rows like the mask, got {[*x.shape]}")
        return x.index_select(0, rows)

    return rows, count, *(tree_map(move, x) for x in tensors)


def _rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are chosen, then the others; and how many are chosen."""
    kernel = _kernel("compact", mask)
    if kernel is None or mask.shape[0] == 0:
        return (~mask).argsort(stable=True), mask.sum()
    rows, count = mask.new_empty(mask.shape, dtype=torch.int64), mask.new_empty((), dtype=torch.int64)
    kernel(mask.data_ptr(), mask.stride(0), mask.shape[0], rows.data_ptr(), count.data_ptr(),
           *_backend.place(mask.device))  # fmt: skip
    return rows, count


def _kernel(name: str, *tensors: Tensor) -> Any:
    """The kernel of that name for these tensors, or None: the CPU has none, and torch's ops trace and differentiate."""
    if not all(_backend.direct(t, t) for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return getattr(_backend.kernels(tensors[0].device), name, None)


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
    kernel = _kernel("expand", compacted, into)
    same = rows.device == count.device == compacted.device == into.device
    if kernel is not None and same and rows.dtype == count.dtype == torch.int64 and into.numel():
        rows, compacted, old = rows.contiguous(), compacted.contiguous(), into.contiguous()
        out = torch.empty_like(old)
        n, row_bytes = len(rows), out[0].numel() * out.element_size()
        kernel(rows.data_ptr(), count.data_ptr(), compacted.data_ptr(), old.data_ptr(), out.data_ptr(),
               n, row_bytes, *_backend.place(into.device))  # fmt: skip
        return out
    chosen = torch.arange(rows.shape[0], device=rows.device) < count
    chosen = chosen.reshape(-1, *(1,) * (into.dim() - 1))
    return into.index_copy(0, rows, torch.where(chosen, compacted, into.index_select(0, rows)))
