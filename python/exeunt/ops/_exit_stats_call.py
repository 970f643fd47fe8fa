"""One call of exit_stats: its arguments, what they must be, and how they reach the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend
from exeunt.ops.packed_head import unpacked
from exeunt.stats import ExitStats

_empty, _float, _int, _fp8 = torch.empty, torch.float32, torch.int64, torch.float8_e4m3fn


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
        hidden, head, packed = self.hidden, self.head, self.packed
        shape, dtype, device = hidden.shape, hidden.dtype, hidden.device
        if len(shape) != 2:
            raise ValueError(f"exit_stats: hidden must have shape [N, D], got {list(shape)}")
        n, d = shape
        vocab = packed or head.shape
        if len(vocab) != 2 or vocab[1] != d or vocab[0] < 1:
            raise ValueError(f"exit_stats: head must have shape [V, {d}] with V >= 1, got {list(vocab)}")
        v = vocab[0]
        if dtype not in _backend.DTYPES:
            raise TypeError(f"exit_stats: hidden must be float32, bfloat16 or float16, got {dtype}")
        if packed is None:
            if head.dtype != dtype:
                raise TypeError(f"exit_stats: head must have the dtype of hidden, {dtype}, got {head.dtype}")
            if d > 1 and head.stride(1) != 1:
                raise ValueError(f"exit_stats: head must have unit stride along D, got strides {head.stride()}")
        elif head.dtype == _fp8 and dtype == _float:
            raise TypeError("exit_stats: hidden must be bfloat16 or float16 beside an Fp8Head, got torch.float32")
        if head.device != device:
            raise ValueError(f"exit_stats: head must be on {device} like hidden, got {head.device}")
        if self.norm not in _backend.NORMS:
            raise ValueError(f"exit_stats: norm must be None, 'rms' or 'layer', got {self.norm!r}")
        if self.head_bias is not None:
            _backend.check_vector("exit_stats", "head_bias", self.head_bias, v, hidden)
        if self.norm_weight is not None:
            _backend.check_vector("exit_stats", "norm_weight", self.norm_weight, d, hidden)
        if self.norm_bias is not None:
            _backend.check_vector("exit_stats", "norm_bias", self.norm_bias, d, hidden)
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"exit_stats: eps must be finite and not negative, got {self.eps}")
        if not math.isfinite(self.scale):
            raise ValueError(f"exit_stats: scale must be finite, got {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"exit_stats: softcap must be finite and positive, got {self.softcap}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"exit_stats: temperature must be finite and positive, got {self.temperature}")
        if not 0 <= self.topk <= 8:
            raise ValueError(f"exit_stats: topk must lie in 0..8, got {self.topk}")
        if any(t is not None for t in (self.rows, self.live, self.columns, self.target, self.seeds)):
            self._check_indices(n)
        if self.logits_out is not None:
            self._check_logits(n, v if self.columns is None else self.columns.shape[0])

    def _check_indices(self, n: int) -> None:
        m = n if self.rows is None else self.rows.shape[0]
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
        if width > 1 and out.stride(1) != 1:
            raise ValueError(f"exit_stats: logits_out must have unit stride along V, got {out.stride()}")
        if out.device != hidden.device:
            raise ValueError(f"exit_stats: logits_out must be on {hidden.device} like hidden, got {out.device}")

    def outputs(self, rows: int | None = None, everything: bool = False) -> ExitStats:
        """Unwritten tensors for the result of that many rows (default: as many as are checked)."""
        device = self.hidden.device
        m = rows if rows is not None else len(self.hidden if self.rows is None else self.rows)

        def floats(*shape: int) -> Tensor:
            return _empty(shape, dtype=_float, device=device)

        def ids(*shape: int) -> Tensor:
            return _empty(shape, dtype=_int, device=device)

        return ExitStats(
            ids(m), floats(m), floats(m), floats(m), floats(m),
            floats(m) if everything or self.target is not None else None,
            floats(m, self.topk) if everything or self.topk else None,
            ids(m, self.topk) if everything or self.topk else None,
            ids(m) if everything or self.seeds is not None else None,
        )  # fmt: skip

    def run(self) -> ExitStats:
        """The checked call: the kernel where there is one, else the reference."""
        hidden = self.hidden
        kernels = _backend.kernels(hidden.device)
        fp8 = self.head.dtype == _fp8
        if kernels is None or (fp8 and not getattr(kernels, "takes_float8", False)):
            _backend.warn_fallback("exit_stats with an Fp8Head" if fp8 else "exit_stats", hidden.device)
            plain = self._asdict() | {"head": unpacked(self.head, self.head_scale, self.packed), "count": self.live}
            for name in ("head_scale", "packed", "live"):
                del plain[name]
            return reference.exit_stats(**plain)
        n, d = hidden.shape
        v = head_rows = self.head.shape[0] if self.packed is None else self.packed[0]
        rows, columns, target, seeds = self.rows, self.columns, self.target, self.seeds
        m = n
        if rows is not None:
            rows, m = _within("rows", rows, n), rows.shape[0]
        if columns is not None:
            columns, v = _within("columns", columns, v), columns.shape[0]
        if target is not None:
            target = _within("target", target, v)
        if seeds is not None:
            seeds = seeds.contiguous()
        out = self.outputs(m)
        if m == 0:
            return out
        if d > 1 and hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        weight, place = _backend.weight_arg(self.head, self.head_scale), _backend.place(hidden.device)
        sizes = (m, v, d, self.topk, seeds is not None)
        if hidden.is_cpu:
            workspace = _backend.scratch(kernels.exit_stats_workspace(*weight[1:3], *sizes, *place))
        else:
            size = kernels.exit_stats_workspace(weight[1], *sizes)
            workspace = _empty(size, dtype=torch.uint8, device=hidden.device)
        bias, norm_weight, norm_bias = self.head_bias, self.norm_weight, self.norm_bias
        vector, pointer, logits = _backend.vector_arg, _backend.pointer, self.logits_out
        kernels.exit_stats(
            hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), n, weight, head_rows, m, v, d,
            pointer(rows), rows is not None and rows.dtype == _int,
            pointer(self.live), self.live is not None and self.live.dtype == _int,
            vector(bias), _backend.NORMS[self.norm], vector(norm_weight), vector(norm_bias),
            self.eps, self.scale, self.softcap or 0.0, self.temperature,
            pointer(logits), 0 if logits is None else _backend.DTYPES[logits.dtype],
            0 if logits is None else logits.stride(0), self.entropy, pointer(columns), pointer(target),
            pointer(out.target), self.topk, pointer(out.topk_logits), pointer(out.topk_ids), pointer(seeds),
            pointer(out.sample), out.argmax.data_ptr(), out.top1.data_ptr(), out.top2.data_ptr(),
            out.sumexp.data_ptr(), out.weighted.data_ptr(), workspace.data_ptr(), *place,
        )  # fmt: skip
        return out


def _within(name: str, index: Tensor, bound: int) -> Tensor:
    """The contiguous index, which must lie in 0..bound-1; on a device the kernel looks, so that nobody waits for it."""
    if index.numel() and index.is_cpu:
        low, high = torch.aminmax(index)
        if int(low) < 0 or int(high) >= bound:
            raise ValueError(f"exit_stats: {name} must lie in 0..{bound - 1}, got {int(low)}..{int(high)}")
    return index.contiguous()
