"""One call of exit_stats: its arguments, what they must be, and how they reach the kernel."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend
from exeunt.ops.packed_head import unpacked
from exeunt.stats import ExitStats

_empty, _float, _int, _fp8 = torch.empty, torch.float32, torch.int64, torch.float8_e4m3fn
_INF, _CPU = math.inf, torch.device("cpu")
_LEAST, _MOST = torch.finfo(_float).tiny, torch.finfo(_float).max  # of a factor that kernels take as float32


class Call(NamedTuple):
    """The arguments of :func:`exeunt.ops.exit_stats` in the order of its schema."""

    hidden: Tensor
    head: Tensor
    head_scale: Tensor | None
    packed: Sequence[int] | None
    head_bias: Tensor | None
    norm: str | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    scale: float
    softcap: float | None
    temperature: float
    rows: Tensor | None
    live: Tensor | None  # the op's `count`, a name that tuples have taken
    columns: Tensor | None
    target: Tensor | None
    topk: int
    seeds: Tensor | None
    entropy: bool
    logits_out: Tensor | None

    def check(self) -> None:
        """Raise one sentence on the first argument that is not what it must be. Runs on every call: kept short."""
        (hidden, head, _, packed, head_bias, norm, norm_weight, norm_bias, eps, scale, softcap, temperature, rows, live,
         columns, target, topk, seeds, _, logits_out) = self  # fmt: skip
        shape, dtype, device = hidden.shape, hidden.dtype, hidden.device
        if len(shape) != 2:
            raise ValueError(f"exit_stats: hidden must have shape [N, D], got {list(shape)}")
        n, d = shape
        vocab = packed or head.shape
        if len(vocab) != 2 or vocab[1] != d or vocab[0] < 1 or d < 1:
            raise ValueError(f"exit_stats: head must have shape [V, {d}] with V, D >= 1, got {list(vocab)}")
        v = vocab[0]
        if dtype not in _backend.DTYPES:
            raise TypeError(f"exit_stats: hidden must be float32, bfloat16 or float16, got {dtype}")
        if packed is None:
            if head.dtype != dtype:
                raise TypeError(f"exit_stats: head must have the dtype of hidden, {dtype}, got {head.dtype}")
            if d > 1 and head.stride()[1] != 1:
                raise ValueError(f"exit_stats: head must have unit stride along D, got strides {head.stride()}")
        elif head.dtype == _fp8 and dtype == _float:
            raise TypeError("exit_stats: hidden must be bfloat16 or float16 beside an Fp8Head, got torch.float32")
        if head.device != device:
            raise ValueError(f"exit_stats: head must be on {device} like hidden, got {head.device}")
        if norm not in _backend.NORMS:
            raise ValueError(f"exit_stats: norm must be None, 'rms' or 'layer', got {norm!r}")
        if head_bias is not None:
            _backend.check_vector("exit_stats", "head_bias", head_bias, v, dtype, device)
        if norm_weight is not None:
            _backend.check_vector("exit_stats", "norm_weight", norm_weight, d, dtype, device)
        if norm_bias is not None:
            _backend.check_vector("exit_stats", "norm_bias", norm_bias, d, dtype, device)
        if not 0 <= eps < _INF:
            raise ValueError(f"exit_stats: eps must be finite and not negative, got {eps}")
        if not -_MOST <= scale <= _MOST:
            raise ValueError(f"exit_stats: scale must be a finite float32, got {scale}")
        if softcap is not None and not _LEAST <= softcap <= _MOST:
            raise ValueError(f"exit_stats: softcap must be a finite, positive float32, got {softcap}")
        if not _LEAST <= temperature <= _MOST:
            raise ValueError(f"exit_stats: temperature must be a finite, positive float32, got {temperature}")
        if not isinstance(topk, int) or not 0 <= topk <= 8:
            raise ValueError(f"exit_stats: topk must be an integer in 0..8, got {topk}")
        if not (rows is live is columns is target is seeds is None):
            self._check_indices(n)
        if logits_out is not None:
            self._check_logits(n, v if columns is None else columns.shape[0])

    def _check_indices(self, n: int) -> None:
        m = n if self.rows is None or self.rows.dim() != 1 else self.rows.shape[0]
        for name, index, shape, right in (
            ("rows", self.rows, "[M]", self.rows is not None and self.rows.dim() == 1),
            ("count", self.live, "[] or [1]", self.live is not None and self.live.numel() == 1),
            ("columns", self.columns, "[K] with K >= 1", self.columns is not None and self.columns.dim() == 1
             and self.columns.shape[0] > 0),
            ("target", self.target, f"[{m}]", self.target is not None and self.target.shape == (m,)),
            ("seeds", self.seeds, f"[{m}]", self.seeds is not None and self.seeds.shape == (m,)),
        ):  # fmt: skip
            if index is None:
                continue
            kinds = (torch.int32, _int) if name in ("rows", "count") else (_int,)
            if index.dtype not in kinds:
                expected = " or ".join(str(k).removeprefix("torch.") for k in kinds)
                raise TypeError(f"exit_stats: {name} must be {expected}, got {index.dtype}")
            if not right:
                raise ValueError(f"exit_stats: {name} must have shape {shape}, got {list(index.shape)}")
            if index.device != self.hidden.device:
                raise ValueError(f"exit_stats: {name} must be on {self.hidden.device} like hidden, got {index.device}")
        if self.target is not None and self.columns is not None:
            raise ValueError("exit_stats: target and columns exclude one another, got both")

    def _check_logits(self, n: int, width: int) -> None:
        out, hidden = self.logits_out, self.hidden
        assert out is not None
        if out.shape != (n, width):
            raise ValueError(f"exit_stats: logits_out must have shape [{n}, {width}], got {list(out.shape)}")
        if out.dtype not in (_float, hidden.dtype):
            raise TypeError(f"exit_stats: logits_out must be float32 or {hidden.dtype}, got {out.dtype}")
        if width > 1 and out.stride()[1] != 1:
            raise ValueError(f"exit_stats: logits_out must have unit stride along V, got {out.stride()}")
        if out.device != hidden.device:
            raise ValueError(f"exit_stats: logits_out must be on {hidden.device} like hidden, got {out.device}")

    def outputs(self, rows: int | None = None, everything: bool = False) -> ExitStats:
        """Unwritten tensors for the result of that many rows (default: as many as are checked)."""
        device = self.hidden.device
        m = rows if rows is not None else (self.hidden if self.rows is None else self.rows).shape[0]

        def made(asked: bool, dtype: torch.dtype, *shape: int) -> Tensor | None:
            return _empty(*shape, dtype=dtype, device=device) if asked or everything else None

        return _results(m, device)._replace(
            target=made(self.target is not None, _float, m),
            topk_logits=made(self.topk > 0, _float, m, self.topk),
            topk_ids=made(self.topk > 0, _int, m, self.topk),
            sample=made(self.seeds is not None, _int, m),
        )

    def run(self) -> ExitStats:
        """The checked call: the kernel where there is one, else the reference."""
        (hidden, head, head_scale, packed, head_bias, norm, norm_weight, norm_bias, eps, scale, softcap, temperature,
         rows, live, columns, target, topk, seeds, entropy, logits) = self  # fmt: skip
        device = hidden.device
        kernels = _backend.kernels(device)
        fp8 = head.dtype == _fp8
        if kernels is None or (fp8 and not getattr(kernels, "takes_float8", False)):
            _backend.warn_fallback("exit_stats with an Fp8Head" if fp8 else "exit_stats", device)
            plain = self._asdict() | {"head": unpacked(head, head_scale, packed), "count": live}
            for name in ("head_scale", "packed", "live"):
                del plain[name]
            return reference.exit_stats(**plain)
        n, d = hidden.shape
        v = head_rows = head.shape[0] if packed is None else packed[0]
        m = n
        if rows is not None:
            rows, m = _within("rows", rows, n), rows.shape[0]
        if columns is not None:
            columns, v = _within("columns", columns, v), columns.shape[0]
        if target is not None:
            target = _within("target", target, v)
        if seeds is not None:
            seeds = seeds.contiguous()
        plain_result = target is seeds is None and topk == 0
        out = _ahead.take(m) if plain_result and hidden.is_cpu else self.outputs(m)
        if m == 0:
            return out
        if d > 1 and hidden.stride()[1] != 1:
            hidden = hidden.contiguous()
        weight, place = _backend.weight_arg(head, head_scale), _backend.place(device)
        sizes = (m, v, d, topk, seeds is not None)
        if hidden.is_cpu:
            workspace = _backend.scratch(kernels.exit_stats_workspace(*weight[1:3], *sizes, *place))
        else:
            size = kernels.exit_stats_workspace(weight[1], *sizes)
            workspace = _empty(size, dtype=torch.uint8, device=device)
        vector, pointer = _backend.vector_arg, _backend.pointer
        kernels.exit_stats(
            hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride()[0], n, weight, head_rows, m, v, d,
            pointer(rows), rows is not None and rows.dtype == _int, pointer(live), live is not None
            and live.dtype == _int, vector(head_bias), _backend.NORMS[norm], vector(norm_weight), vector(norm_bias),
            eps, scale, softcap or 0.0, temperature, pointer(logits), 0 if logits is None
            else _backend.DTYPES[logits.dtype], 0 if logits is None else logits.stride()[0], entropy, pointer(columns),
            pointer(target), pointer(out.target), topk, pointer(out.topk_logits), pointer(out.topk_ids),
            pointer(seeds), pointer(out.sample), out.argmax.data_ptr(), out.top1.data_ptr(), out.top2.data_ptr(),
            out.sumexp.data_ptr(), out.weighted.data_ptr(), workspace.data_ptr(), *place,
        )  # fmt: skip
        return out


class _Ahead(threading.local):
    """Unwritten results for calls to come, on CPU, of row counts that calls repeat.

    A tensor is made in a microsecond, but not after a read of a head has left nothing else in the caches: the five of a
    result then take as long as megabytes of the head do, and sixteen results at once twice as long as one.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], list[ExitStats]] = {}

    def take(self, m: int) -> ExitStats:
        key = m, torch.is_inference_mode_enabled()  # what is made in that mode stays an inference tensor
        kept = self._kept.get(key)
        if kept:
            return kept.pop()
        if kept is None or m > 256:  # it may never come back; of very many rows the product takes long enough
            if len(self._kept) == 64:
                self._kept.clear()
            self._kept[key] = []
            return _results(m, _CPU)
        kept += (_results(m, _CPU) for _ in range(16))
        return kept.pop()


_ahead = _Ahead()


def _results(m: int, device: torch.device) -> ExitStats:
    def floats() -> Tensor:
        return _empty(m, dtype=_float, device=device)  # (m,) would take it half as long again

    return ExitStats(_empty(m, dtype=_int, device=device), floats(), floats(), floats(), floats())


def _within(name: str, index: Tensor, bound: int) -> Tensor:
    """The contiguous index, which must lie in 0..bound-1; on a device the kernel looks, so that nobody waits for it."""
    if index.numel() and index.is_cpu:
        low, high = torch.aminmax(index)
        if int(low) < 0 or int(high) >= bound:
            raise ValueError(f"exit_stats: {name} must lie in 0..{bound - 1}, got {int(low)}..{int(high)}")
    return index.contiguous()
