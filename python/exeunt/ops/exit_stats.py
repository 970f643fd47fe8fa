"""exit_stats: norm, head and online softmax in one pass over the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exeunt.ops import _backend, _library
from exeunt.ops._exit_stats_call import Call
from exeunt.ops.fp8_head import Fp8Head
from exeunt.ops.packed_head import PackedHead
from exeunt.stats import ExitStats

_SCHEMA = (
    "(Tensor hidden, Tensor head, Tensor? head_scale, SymInt[]? packed, Tensor? head_bias, str? norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, float scale, float? softcap, float temperature, "
    "Tensor? rows, Tensor? count, Tensor? columns, Tensor? target, int topk, Tensor? seeds, bool entropy, "
    "Tensor(a!)? logits_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def exit_stats(
    hidden: Tensor,
    head: Tensor | PackedHead | Fp8Head,
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
    columns: Tensor | None = None,
    target: Tensor | None = None,
    topk: int = 0,
    seeds: Tensor | None = None,
    entropy: bool = True,
    logits_out: Tensor | None = None,
) -> ExitStats:
    """Statistics of ``z = softcap * tanh(scale * (W x + b) / softcap) / temperature`` with x the normalised hidden row.

    One read of the head serves the product, the softmax, the two largest logits and the entropy; no [N, V] tensor is
    made unless ``logits_out`` asks for it. The normalised row is rounded once to the head's dtype, as the model's own
    norm would hand it over; products accumulate in float32. A row's result has the same bits in any batch and with
    any number of threads.

    Parameters
    ----------
    hidden : Tensor
        [N, D] float32, bfloat16 or float16, on any row stride.
    head : Tensor, PackedHead or Fp8Head
        [V, D] of the same dtype, unit stride along D: an output embedding's weight. Or a packed copy of it, of any
        dtype; or, beside bfloat16 or float16 rows, which are then rounded to their own dtype, one in 8 bits.
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
    columns : Tensor, optional
        [K] int64: only these rows of the head count as the vocabulary (SpecEE's candidates). Ids in the result are
        rows of the head; ties go to the column listed first.
    target : Tensor, optional
        [M] int64, one id per checked row: ``ExitStats.target`` receives its logit z (for cross-entropy,
        ``stats.logsumexp - stats.target``). Not together with ``columns``.
    topk : int, default 0
        0 to 8: how many of the largest logits ``ExitStats.topk_logits`` and ``topk_ids`` receive.
    seeds : Tensor, optional
        [M] int64, one seed per checked row: ``ExitStats.sample`` receives a draw from the row's softmax, by Gumbel
        noise from Philox keyed by seed and id, so that it depends neither on the batch nor on the threads.
    entropy : bool, default True
        Whether ``weighted`` is wanted; NaN without.
    logits_out : Tensor, optional
        [N, V] float32 or the dtype of ``hidden``: receives the raw product ``W x + b`` of every live row, at its index
        in ``hidden``; other rows are left as they are. The model's own tail (scale, softcap) still applies to it. With
        ``columns``, [N, K].

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
    weight, head_scale, packed = head, None, None
    if isinstance(head, (PackedHead, Fp8Head)):
        if isinstance(head, PackedHead):
            head.check()
        weight, head_scale, packed = head.data, head.scale, head.shape
    if not isinstance(weight, Tensor):
        raise TypeError(f"exit_stats: head must be a Tensor, PackedHead or Fp8Head, got {type(head).__name__}")
    call = Call(hidden, weight, head_scale, packed, head_bias, norm, norm_weight, norm_bias, eps, scale, softcap,
                temperature, rows, count, columns, target, topk, seeds, entropy, logits_out)  # fmt: skip
    call.check()
    if _backend.direct(hidden, weight) and not (hidden.requires_grad and torch.is_grad_enabled()):
        return call.run()
    found = torch.ops.exeunt.exit_stats(*call)
    asked = (True,) * 5 + (target is not None, topk > 0, topk > 0, seeds is not None)
    return ExitStats._make(t if wanted else None for t, wanted in zip(found, asked, strict=True))


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """The op for every device."""
    call = Call(*args)
    return _filled(call, call.run())


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args)
    return _filled(call, call.outputs())


def _filled(call: Call, stats: ExitStats) -> tuple[Tensor, ...]:
    """A schema cannot leave a result out: what nobody asked for is empty."""
    spare = call.outputs(rows=0, everything=True)
    return tuple(empty if t is None else t for t, empty in zip(stats, spare, strict=True))  # type: ignore[misc]


_library.define("exit_stats", _SCHEMA, _forward, _fake)
