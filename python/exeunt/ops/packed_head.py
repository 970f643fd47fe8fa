"""A copy of an output embedding's weight in the order in which the CPU kernels read it, optionally narrower."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.memory import zeros_on_huge_pages
from exeunt.ops import _backend

_TILE, _LINE = 16, 64  # rows of a tile, bytes of a line: WeightArg of csrc/core/params.h
_ROWS_AT_ONCE = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_WIDEST_INT8 = 1 << 17  # elements of a row, whose products' int32 sum holds: 2 ** 17 * 127 * 128 < 2 ** 31


class PackedHead:
    """A head packed for :func:`exeunt.ops.exit_stats` on CPU: tiles of 16 vocabulary rows, their lines side by side.

    It is a copy, made once and shared by all exits; ``nbytes`` says what it costs. Where it beats the weight as it lies
    is measured in ``docs/kernels.md``. On a CPU with tile registers a float32 or float16 copy is multiplied in bfloat16
    parts: no less exact, faster from nine rows on, and rounded differently from the weight as it lies; so, by the order
    of its sums, is a float16 copy elsewhere, and a copy of any dtype below AVX-512. A head of fewer rows than a tile
    stays as it lies, unless it becomes int8.

    The copy watches the tensor that it was made of, as long as that exists: once it was changed in place (a step of an
    optimizer, ``load_state_dict``) or moved (``module.to``) the copy is refused. What is changed behind torch's back,
    or through another tensor after the one passed is gone (``PackedHead(p.detach())``), goes unnoticed.

    Parameters
    ----------
    weight : Tensor
        [V, D] float32, bfloat16 or float16 on CPU; for an int8 copy D <= 131072. A row that is not finite flags every
        hidden row that meets an int8 copy; others as it would where it lies.
    dtype : torch.dtype, optional
        Of the copy: the weight's own (default), ``torch.bfloat16``, ``torch.float16``, or ``torch.int8``: symmetric,
        one scale a vocabulary row, rounding error at most ``max |row| / 254`` a weight. Hidden rows meet an int8 head
        rounded to 15 bits of their largest element, so the weight's rounding is the error that shows.

    Raises
    ------
    ValueError, TypeError
        One sentence on what was expected and what came.

    Examples
    --------
    >>> import torch, exeunt
    >>> weight, hidden = torch.randn(1000, 64), torch.randn(3, 64)
    >>> packed = exeunt.ops.PackedHead(weight, torch.int8)
    >>> packed.nbytes // 1024, packed.shape
    (66, (1000, 64))
    >>> stats = exeunt.ops.exit_stats(hidden, packed)
    >>> bool((stats.top1 - exeunt.ops.exit_stats(hidden, weight).top1).abs().max() < 0.5)
    True
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"PackedHead: weight must have shape [V, D] with V, D >= 1, got {list(weight.shape)}")
        if weight.device.type != "cpu" or weight.dtype not in _DTYPES[:3]:
            raise TypeError(
                f"PackedHead: weight must be float32, bfloat16 or float16 on cpu, got {weight.dtype} on {weight.device}"
            )
        self.dtype = weight.dtype if dtype is None else dtype
        if self.dtype not in _DTYPES:
            raise TypeError(f"PackedHead: dtype must be float32, bfloat16, float16 or int8, got {dtype}")
        self.shape = (weight.shape[0], weight.shape[1])
        v, d = self.shape
        self._source = weakref.ref(weight)
        self._state = _state(weight)
        if self.dtype == torch.int8 and d > _WIDEST_INT8:
            raise ValueError(
                f"PackedHead: weight must have D <= {_WIDEST_INT8} for an int8 copy, got {list(weight.shape)}"
            )
        if v < _TILE and self.dtype != torch.int8:  # no tile to fill: such rows are multiplied one by one, as they lie
            self.data = weight.detach().to(self.dtype, memory_format=torch.contiguous_format, copy=True)
            self.scale = None
            return
        element = torch.empty(0, dtype=self.dtype).element_size()
        per_line = _LINE // element
        tiles, lines = -(-v // _TILE), -(-d // per_line)
        size, scales = tiles * _TILE * lines * _LINE, tiles * _TILE if self.dtype == torch.int8 else 0
        memory = zeros_on_huge_pages((size + 4 * scales,), torch.uint8)  # the scales too: small pages are walked anew
        turned = vectors_multiply()
        line = (_TILE, _TILE, per_line // _TILE) if turned else (_TILE, per_line)
        self.data = memory[:size].view(self.dtype).view(tiles, lines, *line)
        self.scale = memory[size:].view(torch.float32) if scales else None
        with torch.no_grad():
            for start in range(0, v, _ROWS_AT_ONCE):
                rows = weight[start : start + _ROWS_AT_ONCE].detach()
                if self.scale is not None:
                    rows = rows.float()
                    scale = rows.abs().amax(1) / 127
                    self.scale[start : start + len(rows)] = scale
                    rows = (rows / scale.clamp_min(1e-38)[:, None]).round()
                    rows[~scale.isfinite()] = 0  # NaN is no int8; times such a scale it flags who meets it
                packed = in_tiles(rows.to(self.dtype), turned)
                self.data[start // _TILE :][: len(packed)] = packed

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the copy takes."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self) -> Tensor:
        """[V, D]: the values that the kernels multiply with, float32 where they are int8."""
        return unpacked(self.data, self.scale, self.shape)

    def check(self) -> None:
        """Raise if the weight was changed in place or moved after it was packed."""
        source = self._source()
        if source is not None and (state := _state(source)) != self._state:
            raise ValueError(
                "PackedHead: its weight must be as it was when packed, but it was changed in place or moved since "
                f"(version and address {state}, packed at {self._state}): pack it again"
            )


def _state(weight: Tensor) -> tuple[int | None, int]:
    """What tells that a weight is what it was: its version, which inference tensors have not, and its address."""
    return None if weight.is_inference() else weight._version, weight.data_ptr()


def vectors_multiply() -> bool:
    """Whether vector registers do, for want of tile registers: they want tiles turned."""
    return _backend.cpu is None or _backend.cpu.isa() != "amx"


def in_tiles(rows: Tensor, turned: bool) -> Tensor:
    """[..., n, D] -> [..., tiles, lines, 16, elements of a line]: as the CPU kernels read packed rows, zeros beyond.

    Turned, the units of 4 bytes of a tile's rows lie side by side: [..., tiles, lines, 16 units, 16, elements of one].
    """
    *outer, n, d = rows.shape
    per_line = _LINE // rows.element_size()
    tiles, lines = -(-n // _TILE), -(-d // per_line)
    padded = rows.new_zeros(*outer, tiles * _TILE, lines * per_line)
    padded[..., :n, :d] = rows
    packed = padded.view(*outer, tiles, _TILE, lines, per_line).transpose(-3, -2)
    return packed.unflatten(-1, (_TILE, -1)).transpose(-3, -2) if turned else packed


def unpacked(data: Tensor, scale: Tensor | None, shape: Sequence[int] | None) -> Tensor:
    """The [V, D] weight behind a PackedHead's or Fp8Head's tensors; ``data`` itself where ``shape`` is None."""
    if shape is None:
        return data
    if data.dtype == torch.float8_e4m3fn:
        assert scale is not None
        return data.float() * scale[:, None]
    if data.dim() == 2:
        return data
    if data.dim() == 5:
        data = data.transpose(2, 3).flatten(3)
    rows = data.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]]
    return rows if scale is None else rows.float() * scale[: shape[0], None]
