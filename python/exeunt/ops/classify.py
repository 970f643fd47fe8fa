"""classify: the whole check of a classifier's exit in one call, from the states of a text's tokens to who leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend, _library
from exeunt.ops.small_head import Given, Layer, check_layers
from exeunt.stats import ExitStats

_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? pooler_weight, Tensor? pooler_bias, "
    "str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_DTYPES, _threads = _backend.DTYPES, torch.get_num_threads


def classify(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    pooler_weight: Tensor | None = None,
    pooler_bias: Tensor | None = None,
    activation: str = "tanh",
) -> tuple[Tensor, ExitStats]:
    """Logits ``W activation(P x + p) + b`` of a classifier's exit head and their statistics, x a text's state.

    For heads of up to a few dozen classes. The state is rounded once to the weight's dtype before each product, which
    accumulates in float32; means are taken in float64. A row's result has the same bits in any batch, with any padding
    behind it, and with any number of threads.

    Parameters
    ----------
    hidden : Tensor
        [N, D] states of texts, or [N, S, D] states of their tokens, whose mean is taken; float32, bfloat16 or float16.
    weight : Tensor
        [V, D], or [V, P] with a pooler; float32 or the dtype of ``hidden``, unit stride along the row.
    bias : Tensor, optional
        [V], float32 or the dtype of ``hidden``, as all vectors here.
    mask : Tensor, optional
        [N, S] bool, for states of tokens: True where one counts. By default all do; a text without any has state 0.
    pooler_weight : Tensor, optional
        [P, D] of the dtype of ``weight``.
    pooler_bias : Tensor, optional
        [P].
    activation : {"none", "tanh", "relu", "sigmoid"}
        After the pooler.

    Returns
    -------
    logits : Tensor
        [N, V] float32.
    stats : ExitStats
        Of the logits.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came.
    RuntimeError
        If ``hidden`` requires a gradient while gradients are recorded: :func:`exeunt.reference.classify` has one.

    Examples
    --------
    >>> import torch, exeunt
    >>> logits, stats = exeunt.ops.classify(torch.randn(4, 9, 64), torch.randn(3, 64))
    >>> logits.shape, bool((stats.argmax == logits.argmax(1)).all())
    (torch.Size([4, 3]), True)
    """
    args = (hidden, weight, bias, mask, pooler_weight, pooler_bias, activation)
    direct = _backend.direct(hidden, weight) and not (hidden.requires_grad and torch.is_grad_enabled())
    layers = _check(args, direct)
    if direct:
        logits, *stats = _launch(args, layers)
    else:
        logits, *stats = torch.ops.exeunt.classify(*args)
    return logits, ExitStats(*stats)


def _check(args: tuple[Any, ...], addressed: bool) -> tuple[Layer, Layer]:
    """Raise unless the arguments are what they must be; the pooler and the head."""
    hidden, weight, bias, mask, pooler_weight, pooler_bias, activation = args
    if hidden.dim() not in (2, 3):
        raise ValueError(f"classify: hidden must have shape [N, D] or [N, S, D], got {list(hidden.shape)}")
    states = hidden.shape[-1], hidden.dtype, hidden.device, addressed
    layers = check_layers("classify", states, (weight, bias, "none"), (pooler_weight, pooler_bias, activation))
    if mask is None:
        return layers
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"classify: mask must have shape [N, S] like hidden [N, S, D], got {list(mask.shape)} "
            f"and {list(hidden.shape)}"
        )
    if mask.dtype != torch.bool or mask.device != hidden.device:
        raise TypeError(f"classify: mask must be bool on {hidden.device}, got {mask.dtype} on {mask.device}")
    return layers


def _launch(args: tuple[Any, ...], layers: tuple[Layer, Layer]) -> tuple[Tensor, ...]:
    (hidden, weight, bias, mask, pooler_weight, pooler_bias, activation), cpu = args, _backend.cpu
    if cpu is None or not hidden.is_cpu:
        _backend.warn_fallback("classify", hidden.device)
        logits, stats = reference.classify(
            hidden, weight, bias, mask=mask, pooler_weight=pooler_weight, pooler_bias=pooler_bias, activation=activation
        )
        return logits, *stats[:5]
    (pooler, head), n = layers, hidden.shape[0]
    floats: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    logits, statistics = torch.empty(n, head[0], **floats), torch.empty(4, n, **floats)
    argmax = torch.empty(n, dtype=torch.int64, device=hidden.device)
    if n:
        states, kept = _states(hidden, mask)
        cpu.classify(
            *states, pooler, head, logits.data_ptr(), argmax.data_ptr(), statistics.data_ptr(), _threads(),
        )  # fmt: skip
        del kept
    return logits, argmax, *statistics.unbind(0)


def _registered(*args: Any) -> tuple[Tensor, ...]:
    layers = _check(args, _backend.cpu is not None and args[0].is_cpu)
    logits, argmax, *floats = _launch(args, layers)
    return logits, argmax, *(f.clone() for f in floats)  # an operator's results share no storage


def _states(hidden: Tensor, mask: Tensor | None) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """States as the binding wants them, and the tensors that must outlive the call."""
    shape = hidden.shape
    if shape[-1] > 1 and hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if mask is not None and shape[1] > 1 and mask.stride(1) != 1:
        mask = mask.contiguous()
    at = (hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), shape[0], shape[-1])
    tokens = (shape[1], hidden.stride(1)) if len(shape) == 3 else (1, 0)
    return (*at, *tokens, *((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0)))), (hidden, mask)


class Check:
    """:func:`classify` and a plain threshold on its confidence in one call of the kernel, which says how many leave.

    For exits in a loop, where between two layers whatever a call touches has to come back into the cache: what is the
    same from call to call is put together once, and calls of one forward share their memory (:meth:`room`).

    Parameters
    ----------
    weight, bias, pooler_weight, pooler_bias, activation
        As for :func:`classify`, on the CPU.
    measure : str
        One of ``max_prob``, ``margin``, ``logit_margin``, ``neg_entropy``, ``neg_normalized_entropy``.
    threshold : float
        Rows leave whose score exceeds it.
    tokens : bool
        Whether states are those of tokens, whose mean is taken; else the first token's is read.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came; calls raise them likewise.

    Examples
    --------
    >>> import torch
    >>> from exeunt.ops import Check
    >>> check = Check(torch.eye(2), None, measure="max_prob", threshold=0.9, tokens=True)
    >>> gone, out = check(torch.tensor([[[4.0, 0.0]], [[0.0, 0.1]], [[0.0, 9.0]]]), None)
    >>> gone, check.leave(out, 3), check.logits(out, 3)[0]
    (2, tensor([ True, False,  True]), tensor([4., 0.]))
    """

    #: What it can compare, as csrc/core/params.h numbers it.
    MEASURES: ClassVar = {"max_prob": 1, "margin": 2, "logit_margin": 3, "neg_entropy": 4, "neg_normalized_entropy": 5}

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        pooler_weight: Tensor | None = None,
        pooler_bias: Tensor | None = None,
        activation: str = "tanh",
        *,
        measure: str,
        threshold: float,
        tokens: bool,
    ) -> None:
        if measure not in self.MEASURES:
            raise ValueError(f"Check: measure must be one of {', '.join(self.MEASURES)}, got {measure!r}")
        self._first = weight if pooler_weight is None else pooler_weight
        self._width = self._first.shape[-1] if self._first.dim() else 0
        self._pooler: Given = (pooler_weight, pooler_bias, activation)
        self._head: Given = (weight, bias, "none")
        self._classes = self._layers(addressed=False)[1][0]
        self._tensors = [t for t in (weight, bias, pooler_weight, pooler_bias) if t is not None]
        self._decides = (tokens, self.MEASURES[measure], float(threshold))
        self._mean = tokens
        self._where: list[int] = []

    @staticmethod
    def runs_on(weight: Tensor) -> bool:
        """Whether the kernel takes heads of such a weight."""
        return _backend.cpu is not None and weight.is_cpu and weight.dtype in _backend.DTYPES

    def _layers(self, addressed: bool) -> tuple[Layer, Layer]:
        """Pooler and head as they are now: a model may have been cast or moved."""
        first = self._first
        if not first.is_cpu or first.dtype not in _DTYPES:
            raise TypeError(
                f"Check: weights must be float32, bfloat16 or float16 on cpu, got {first.dtype} on {first.device}"
            )
        return check_layers("Check", (self._width, first.dtype, first.device, addressed), self._head, self._pooler)

    def _find(self) -> None:
        """Look where the weights are, and tell the kernel if they have been put elsewhere."""
        where = [t.data_ptr() for t in self._tensors]
        if where != self._where:
            cpu: Any = _backend.cpu
            self._bound = cpu.Check(*self._layers(addressed=True), self._width, *self._decides)
            self._where = where

    @staticmethod
    def room(checks: Sequence[Check], hidden: Tensor) -> Tensor | None:
        """Memory that calls of some checks can share, one after the other, each overwriting what the last one found.

        Parameters
        ----------
        checks : sequence of Check
            Their weights are looked up now.
        hidden : Tensor
            [n, S, D]: states like this, of as many rows or fewer, are to come.

        Returns
        -------
        Tensor or None
            uint8; None where the kernel does not serve, since something traces.
        """
        if not (checks and hidden.is_cpu and _backend.direct(hidden, hidden)):
            return None
        for check in checks:
            check._find()
        size = hidden.shape[0] * (4 * max([check._classes for check in checks]) + 1)  # logits, and who leaves
        return torch.empty(size, dtype=torch.uint8, device=hidden.device)

    def __call__(self, hidden: Tensor, mask: Tensor | None, room: Tensor | None = None) -> tuple[int, Tensor]:
        """Judge n rows.

        Parameters
        ----------
        hidden : Tensor
            [n, S, D] float32, bfloat16 or float16 on the CPU.
        mask : Tensor or None
            [n, S] bool, for means.
        room : Tensor, optional
            From :meth:`room`; by default this call has its own.

        Returns
        -------
        gone : int
            How many leave; -1 where the kernel cannot tell: a score lies too near to the threshold, or something
            traces. :func:`classify` then says what there is to know.
        out : Tensor
            For :meth:`logits` and :meth:`leave`; the room.
        """
        dtype = _DTYPES.get(hidden.dtype)
        if dtype is None or not hidden.is_cpu or hidden.dim() != 3:
            raise ValueError(
                f"Check: hidden must be [n, S, {self._width}] float32, bfloat16 or float16 on cpu, got "
                f"{list(hidden.shape)} {hidden.dtype} on {hidden.device}"
            )
        if room is None:
            room = self.room((self,), hidden)
        elif not self._where:  # made for other checks
            self._find()
        at = step = 0
        if mask is not None and self._mean:
            if mask.dtype is not torch.bool or mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"Check: mask must be bool of shape {list(hidden.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
                )
            (step, unit), at = mask.stride(), mask.data_ptr()
            room = room if unit == 1 else None
        if room is None:
            return -1, hidden
        gone = self._bound.judge(
            hidden.data_ptr(), dtype, hidden.shape, hidden.stride(), at, step, room.data_ptr(), room.nbytes, _threads(),
        )  # fmt: skip
        return gone, room

    def logits(self, out: Tensor, rows: int) -> Tensor:
        """Logits [rows, V]: a view of what a call returned."""
        return out[: rows * self._classes * 4].view(torch.float32).view(rows, self._classes)

    def leave(self, out: Tensor, rows: int) -> Tensor:
        """Who leaves, [rows] bool: a view of it."""
        begin = rows * self._classes * 4
        return out[begin : begin + rows].view(torch.bool)


def _fake(hidden: Tensor, weight: Tensor, *args: object) -> tuple[Tensor, ...]:
    n = hidden.shape[0]
    floats = [hidden.new_empty(n, dtype=torch.float32) for _ in range(4)]
    logits = hidden.new_empty((n, weight.shape[0]), dtype=torch.float32)
    return logits, hidden.new_empty(n, dtype=torch.int64), *floats


_library.define("classify", _SCHEMA, _registered, _fake)
