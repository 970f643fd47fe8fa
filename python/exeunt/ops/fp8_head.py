"""A copy of an output embedding's weight in 8-bit floating point, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096
_LARGEST = 448.0  # of float8_e4m3


class Fp8Head:
    """A head as float8_e4m3 with one float32 scale a vocabulary row, for :func:`exeunt.ops.exit_stats` on CUDA.

    Half the bytes of a bfloat16 head; a weight's rounding error is at most 1/16 of itself, or ``max |row| / 2 ** 18``.
    Kernels widen it exactly on its way to the tensor cores, so that is the only error. Elsewhere the reference serves.

    Parameters
    ----------
    weight : Tensor
        [V, D] float32, bfloat16 or float16, on any device. Rows with NaN or infinities flag every hidden row.

    Attributes
    ----------
    data : Tensor
        [V, D] float8_e4m3fn, rows 16-byte aligned.
    scale : Tensor
        [V] float32: the weight is ``data * scale``.

    Raises
    ------
    ValueError, TypeError
        One sentence on what was expected and what came.

    Examples
    --------
    >>> import torch, exeunt
    >>> head = exeunt.ops.Fp8Head(torch.eye(3))
    >>> head.shape, head.nbytes, head.unpack().diagonal()
    ((3, 3), 60, tensor([1., 1., 1.]))
    """

    def __init__(self, weight: Tensor) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"Fp8Head: weight must have shape [V, D] with V, D >= 1, got {list(weight.shape)}")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"Fp8Head: weight must be float32, bfloat16 or float16, got {weight.dtype}")
        v, d = weight.shape
        self.shape = (v, d)
        self._padded = torch.zeros(v, -(-d // 16) * 16, dtype=torch.float8_e4m3fn, device=weight.device)
        self.data = self._padded[:, :d]
        self.scale = torch.empty(v, dtype=torch.float32, device=weight.device)
        with torch.no_grad():
            for start in range(0, v, _ROWS_AT_ONCE):
                rows = weight[start : start + _ROWS_AT_ONCE].detach().float()
                scale = rows.abs().amax(1) / _LARGEST
                self.scale[start : start + len(rows)] = scale
                self.data[start : start + len(rows)] = (rows / scale.clamp_min(1e-38)[:, None]).to(self.data.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the copy takes."""
        return self._padded.nbytes + self.scale.nbytes

    def unpack(self) -> Tensor:
        """[V, D] float32: the values that the kernels multiply with."""
        return self.data.float() * self.scale[:, None]
