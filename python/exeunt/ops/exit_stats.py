"""exit_stats: norm, head and online softmax in one pass over the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend
from exeunt.ops.packed_head import PackedHead, unpacked
from exeunt.stats import ExitStats

_NORMS = {None: 0, "rms": 1, "layer": 2}
_SCHEMA = (
    "exit_stats(Tensor hidden, Tensor head, Tensor? head_scale, SymInt[]? packed, Tensor? head_bias, str? norm, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, float scale, float? softcap, float temperature, Tensor? rows, Tensor? count, Tensor(a!)? logits_out)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def exit_stats(
    hidden: Tensor,
    head: Tensor | PackedHead,
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
    """Statistics of ``z = softcap * tanh(scale * (W x + b) / softcap) / temperature`` with x the normalised hidden row.

    One read of the head serves the product, the softmax, the two largest logits and the entropy; no [N, V] tensor is
    made unless ``logits_out`` asks for it. The normalised row is rounded once to the head's dtype, as the model's own norm
    would hand it over; products accumulate in float32. A row's result has the same bits in any batch and with any number of threads.

    Parameters
    ----------
    hidden : Tensor
        [N, D] float32, bfloat16 or float16, on any row stride.
    head : Tensor or PackedHead
        [V, D] of the same dtype, unit stride along D: an output embedding's weight. Or a packed copy of it, of any dtype.
    head_bias : Tensor, optional
        [V], float32 or the dtype of ``hidden``.
    norm : {None, "rms", "layer"}
        Normalisation of ``hidden`` before the product.
    norm_weight, norm_bias : Tensor, optional
        [D], float32 or the dtype of ``hidden`` (fold Gemma's ``1 + w`` into a float32 weight).
    eps : float, default 1e-6
        Added to the mean square (or variance) of the norm.
    scale : float, default 1.0
        Factor on the raw logits.
    softcap : float, optional
        Positive bound of the logits, by tanh.
    temperature : float, default 1.0
        Positive divisor of the logits.
    rows : Tensor, optional
        [M] int32 or int64: check only these rows of ``hidden``; the result then has M entries, in that order.
    count : Tensor, optional
        One integer on the device: only the first ``count`` of the M rows are live; the others come back flagged.
    logits_out : Tensor, optional
        [N, V] float32 or the dtype of ``hidden``: receives the raw product ``W x + b`` of every live row, at its index
        in ``hidden``; other rows are left as they are. The model's own tail (scale, softcap) still applies to it.

    Returns
    -------
    ExitStats
        ``argmax`` int64 and ``top1, top2, sumexp, weighted`` float32, each [N] (or [M] with ``rows``). Rows that
        meet NaN or +inf are flagged with argmax -1.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came, before any kernel runs.
    RuntimeError
        If ``hidden`` requires a gradient while gradients are recorded: there is none.

    Notes
    -----
    Online softmax after Milakov and Gimelshein (2018), in the shifted form of :class:`exeunt.ExitStats`. The
    result is not differentiable; that of :func:`exeunt.reference.exit_stats` is.

    Examples
    --------
    >>> import torch, exeunt
    >>> hidden, head = torch.randn(3, 64), torch.randn(1000, 64)
    >>> stats = exeunt.ops.exit_stats(hidden, head, norm="rms", norm_weight=torch.ones(64))
    >>> stats.max_prob.shape, bool((stats.margin <= stats.max_prob).all())
    (torch.Size([3]), True)
    """
    head_scale, packed = None, None
    if isinstance(head, PackedHead):
        head.check()
        head, head_scale, packed = head.data, head.scale, head.shape
    args = (hidden, head, head_scale, packed, head_bias, norm, norm_weight, norm_bias, eps, scale, softcap, temperature,
            rows, count)  # fmt: skip
    _check(*args, logits_out)
    wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
    if not wants_gradient and _backend.direct(hidden, head, head_bias, norm_weight, norm_bias, rows, count, logits_out):
        return ExitStats(*_forward(*args, logits_out))
    return ExitStats(*torch.ops.exeunt.exit_stats(*args, logits_out))


def _check(
    hidden: Tensor,
    head: Tensor,
    head_scale: Tensor | None,
    packed: Sequence[int] | None,
    head_bias: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: float,
    softcap: float | None,
    temperature: float,
    rows: Tensor | None,
    count: Tensor | None,
    logits_out: Tensor | None,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"exit_stats: hidden must have shape [N, D], got {list(hidden.shape)}")
    n, d = hidden.shape
    shape = list(packed or head.shape)
    if len(shape) != 2 or shape[1] != d or shape[0] < 1:
        raise ValueError(f"exit_stats: head must have shape [V, {d}] with V >= 1, got {shape}")
    if hidden.dtype not in _backend.DTYPES:
        raise TypeError(f"exit_stats: hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    if packed is None and head.dtype != hidden.dtype:
        raise TypeError(f"exit_stats: head must have the dtype of hidden, {hidden.dtype}, got {head.dtype}")
    if packed is None and d > 1 and head.stride(1) != 1:
        raise ValueError(f"exit_stats: head must have unit stride along D, got strides {head.stride()}")
    if norm not in _NORMS:
        raise ValueError(f"exit_stats: norm must be None, 'rms' or 'layer', got {norm!r}")
    v = shape[0]
    vectors = (("head_bias", head_bias, v), ("norm_weight", norm_weight, d), ("norm_bias", norm_bias, d))
    for name, vector, size in vectors:
        if vector is None:
            continue
        if vector.shape != (size,):
            raise ValueError(f"exit_stats: {name} must have shape [{size}], got {list(vector.shape)}")
        if vector.dtype not in (torch.float32, hidden.dtype):
            raise TypeError(f"exit_stats: {name} must be float32 or {hidden.dtype}, got {vector.dtype}")
    if logits_out is not None:
        if logits_out.shape != (n, v):
            raise ValueError(f"exit_stats: logits_out must have shape [{n}, {v}], got {list(logits_out.shape)}")
        if logits_out.dtype not in (torch.float32, hidden.dtype):
            raise TypeError(f"exit_stats: logits_out must be float32 or {hidden.dtype}, got {logits_out.dtype}")
        if v > 1 and logits_out.stride(1) != 1:
            raise ValueError(f"exit_stats: logits_out must have unit stride along V, got {logits_out.stride()}")
    for name, index, shape in (("rows", rows, "[M]"), ("count", count, "[] or [1]")):
        if index is None:
            continue
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"exit_stats: {name} must be int32 or int64, got {index.dtype}")
        if (name == "rows" and index.dim() != 1) or (name == "count" and index.numel() != 1):
            raise ValueError(f"exit_stats: {name} must have shape {shape}, got {list(index.shape)}")
    for name, tensor in (*((k, t) for k, t, _ in vectors), ("head", head), ("rows", rows), ("count", count),
                         ("logits_out", logits_out)):  # fmt: skip
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"exit_stats: {name} must be on {hidden.device} like hidden, got {tensor.device}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"exit_stats: eps must be finite and not negative, got {eps}")
    if not math.isfinite(scale):
        raise ValueError(f"exit_stats: scale must be finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"exit_stats: softcap must be finite and positive, got {softcap}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"exit_stats: temperature must be finite and positive, got {temperature}")


def _forward(
    hidden: Tensor,
    head: Tensor,
    head_scale: Tensor | None,
    packed: Sequence[int] | None,
    head_bias: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: float,
    softcap: float | None,
    temperature: float,
    rows: Tensor | None,
    count: Tensor | None,
    logits_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op itself, for every device: the kernel where there is one, else the reference."""
    if _backend.cpu is None or hidden.device.type != "cpu":
        _backend.warn_fallback("exit_stats", hidden.device)
        found = reference.exit_stats(
            hidden.detach(), unpacked(head, head_scale, packed).detach(), head_bias=head_bias, norm=norm, norm_weight=norm_weight,
            norm_bias=norm_bias, eps=eps, scale=scale, softcap=softcap, temperature=temperature, rows=rows,
            count=count, logits_out=logits_out,
        )  # fmt: skip
        return found.argmax, found.top1, found.top2, found.sumexp, found.weighted
    n, d = hidden.shape
    v = packed[0] if packed else head.shape[0]
    if rows is not None:
        rows = rows.contiguous()
        if rows.numel():
            low, high = torch.aminmax(rows)
            if int(low) < 0 or int(high) >= n:
                raise ValueError(f"exit_stats: rows must lie in 0..{n - 1}, got {int(low)}..{int(high)}")
    m = n if rows is None else rows.shape[0]
    outs = _outputs(hidden, m)
    if m == 0:
        return outs
    if d > 1 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    vectors = [t if t is None else t.contiguous() for t in (head_bias, norm_weight, norm_bias)]
    weight, threads = _backend.weight_arg(head, head_scale), torch.get_num_threads()
    workspace = torch.empty(_backend.cpu.exit_stats_workspace(weight[1], m, v, d, threads), dtype=torch.uint8)
    logits = (0, 0, 0)
    if logits_out is not None:
        logits = (logits_out.data_ptr(), _backend.DTYPES[logits_out.dtype], logits_out.stride(0))
    _backend.cpu.exit_stats(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), weight, m, v, d,
        0 if rows is None else rows.data_ptr(), rows is not None and rows.dtype == torch.int64,
        0 if count is None else count.data_ptr(), count is not None and count.dtype == torch.int64,
        *_backend.vector_arg(vectors[0]), _NORMS[norm], *_backend.vector_arg(vectors[1]),
        *_backend.vector_arg(vectors[2]), eps, scale, softcap or 0.0, temperature, *logits,
        *(t.data_ptr() for t in outs), workspace.data_ptr(), threads,
    )  # fmt: skip
    return outs


def _outputs(hidden: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    floats = [hidden.new_empty(m, dtype=torch.float32) for _ in range(4)]
    return hidden.new_empty(m, dtype=torch.int64), floats[0], floats[1], floats[2], floats[3]


def _fake(hidden: Tensor, head: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = args[10]
    return _outputs(hidden, hidden.shape[0] if rows is None else rows.shape[0])


def _autograd(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise RuntimeError(
            "exit_stats has no gradient and hidden requires one: call it under torch.no_grad(), or use "
            "exeunt.reference.exit_stats, which is differentiable"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.exeunt.exit_stats(hidden, *args)


_lib = torch.library.Library("exeunt", "DEF")
_lib.define(_SCHEMA)
_lib.impl("exit_stats", _forward, "CompositeExplicitAutograd")
_lib.impl("exit_stats", _autograd, "Autograd")
torch.library.register_fake("exeunt::exit_stats", _fake, lib=_lib)
