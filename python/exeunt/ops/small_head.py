"""Heads of a few classes, probes and saturation: the checks that read no vocabulary, each in one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend, _library
from exeunt.ops._backend import NO_VECTOR, Vector

_empty, _float = torch.empty, torch.float32
ACTIVATIONS = {"none": 0, "tanh": 1, "relu": 2, "sigmoid": 3}
_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? pooler_weight, Tensor? pooler_bias, str activation, "
    "str final, str? norm, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor"
)


def small_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooler_weight: Tensor | None = None,
    pooler_bias: Tensor | None = None,
    activation: str = "tanh",
    final: str = "none",
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Logits ``final(W activation(P x + p) + b)`` of a classifier's exit head in one call, x the normalised row.

    For heads whose logits are wanted whole: classes up to a few dozen (DeeBERT's pooler and linear layer, PABEE's
    shared pooler). Rows are rounded once to the weight's dtype before each product, which accumulates in float32. A
    row's result has the same bits in any batch and with any number of threads.

    Parameters
    ----------
    hidden : Tensor
        [N, D] float32, bfloat16 or float16, on any row stride.
    weight : Tensor
        [V, D], or [V, P] with a pooler; float32 or the dtype of ``hidden``, unit stride along the row.
    bias : Tensor, optional
        [V], float32 or the dtype of ``hidden``, as all vectors here.
    pooler_weight : Tensor, optional
        [P, D] of the dtype of ``weight``.
    pooler_bias : Tensor, optional
        [P].
    activation, final : {"none", "tanh", "relu", "sigmoid"}
        After the pooler (default "tanh") and after the head (default "none").
    norm : {None, "rms", "layer"}
        Normalisation of ``hidden`` first.
    norm_weight, norm_bias : Tensor, optional
        [D].
    eps : float, default 1e-6
        Added to the mean square (or variance) of the norm.

    Returns
    -------
    Tensor
        [N, V] float32; a row that holds NaN gives NaN.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came.
    RuntimeError
        If ``hidden`` requires a gradient while gradients are recorded: :func:`exeunt.reference.small_head` has one.

    Examples
    --------
    >>> import torch, exeunt
    >>> logits = exeunt.ops.small_head(torch.randn(4, 64), torch.randn(3, 64), pooler_weight=torch.randn(64, 64) / 8)
    >>> logits.shape
    torch.Size([4, 3])
    """
    args = (hidden, weight, bias, pooler_weight, pooler_bias, activation, final, norm, norm_weight, norm_bias, eps)
    return _run("small_head", "pooler", args)


def probe(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    activation: str = "relu",
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Probability that a linear or one-hidden-layer probe gives each hidden row, fused with the norm.

    CALM's "meta-classifier" and SpecEE's predictor: a confidence that reads no head.

    Parameters
    ----------
    hidden : Tensor
        [N, D] float32, bfloat16 or float16.
    weight : Tensor
        [D], or [H] with a hidden layer; float32 or the dtype of ``hidden``.
    bias : Tensor, optional
        One number.
    hidden_weight, hidden_bias : Tensor, optional
        [H, D] and [H]: the hidden layer.
    activation : {"relu", "tanh", "sigmoid", "none"}
        After the hidden layer.
    norm, norm_weight, norm_bias, eps
        As in :func:`small_head`.

    Returns
    -------
    Tensor
        [N] float32 in [0, 1]; NaN where a row holds NaN, so that it never exits.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`small_head`.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.ops.probe(torch.randn(2, 64), torch.zeros(64), norm="rms")
    tensor([0.5000, 0.5000])
    """
    if weight.dim() != 1:
        raise ValueError(f"probe: weight must have shape [D], or [H] with hidden_weight, got {list(weight.shape)}")
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"probe: bias must be one number, got shape {list(bias.shape)}")
    if bias is not None and bias.dim() != 1:
        bias = bias.reshape(1)
    args = (hidden, weight.unsqueeze(0), bias, hidden_weight, hidden_bias, activation, "sigmoid", norm, norm_weight,
            norm_bias, eps)  # fmt: skip
    return _run("probe", "hidden", args).squeeze(1)


def saturation(hidden: Tensor, previous: Tensor) -> Tensor:
    """Cosine similarity of each hidden row and the layer's input (CALM's hidden-state saturation).

    Parameters
    ----------
    hidden, previous : Tensor
        [N, D] float32, bfloat16 or float16.

    Returns
    -------
    Tensor
        [N] float32 in [-1, 1]; 0 where a row is all zeros, NaN where one holds NaN. Sums are taken in float64.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`small_head`.

    Examples
    --------
    >>> import torch, exeunt
    >>> h = torch.randn(2, 64)
    >>> exeunt.ops.saturation(h, -2 * h)
    tensor([-1., -1.])
    """
    for name, t in (("hidden", hidden), ("previous", previous)):
        if t.dtype not in _backend.DTYPES:
            raise TypeError(f"saturation: {name} must be float32, bfloat16 or float16, got {t.dtype}")
    if hidden.dim() != 2 or previous.shape != hidden.shape:
        raise ValueError(
            f"saturation: hidden and previous must both have shape [N, D], got {list(hidden.shape)} and "
            f"{list(previous.shape)}"
        )
    if hidden.device != previous.device:
        raise ValueError(f"saturation: previous must be on {hidden.device} like hidden, got {previous.device}")
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or previous.requires_grad)
    if _backend.direct(hidden, previous) and not wants_gradient:
        return _saturation(hidden, previous)
    return torch.ops.exeunt.saturation(hidden, previous)


def _run(op: str, pooler: str, args: tuple[Any, ...]) -> Tensor:
    """small_head's arguments, checked in the words of ``op``, which calls the layer before the head ``pooler``."""
    hidden, weight = args[:2]
    direct = _backend.direct(hidden, weight) and not (hidden.requires_grad and torch.is_grad_enabled())
    facts = _check(op, pooler, args, direct)
    return _launch(args, facts) if direct else torch.ops.exeunt.small_head(*args)


#: A layer as the binding wants it: outputs, inputs, activation; address, dtype and row stride of the weight; address,
#: dtype and stride of the bias. Each argument is looked at once, to check it and to know this: a look takes a tenth of
#: a microsecond, and a call has a few. Where something traces there are no addresses to ask for.
Layer = tuple[int, ...]
_NO_LAYER: Layer = (0,) * 9


def _check(op: str, pooler: str, args: tuple[Any, ...], addressed: bool) -> tuple[Layer, Layer, Vector, Vector]:
    """Raise unless the arguments are what they must be; the pooler, the head and the norm's two vectors."""
    (hidden, weight, bias, pooler_weight, pooler_bias, activation, final, norm, norm_weight, norm_bias, eps) = args
    shape = hidden.shape
    if len(shape) != 2:
        raise ValueError(f"{op}: hidden must have shape [N, D], got {list(shape)}")
    d, dtype, device = shape[1], hidden.dtype, hidden.device
    states = d, dtype, device, addressed
    first, head = check_layers(op, states, (weight, bias, final), (pooler_weight, pooler_bias, activation), pooler)
    gain = shift = NO_VECTOR
    if norm_weight is not None:
        gain = _backend.check_vector(op, "norm_weight", norm_weight, d, dtype, device, addressed)
    if norm_bias is not None:
        shift = _backend.check_vector(op, "norm_bias", norm_bias, d, dtype, device, addressed)
    if norm not in _backend.NORMS:
        raise ValueError(f"{op}: norm must be None, 'rms' or 'layer', got {norm!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    return first, head, gain, shift


#: Weight, bias and activation of a layer. Width, dtype and device of states, and whether anybody may ask for addresses.
Given = tuple[Tensor | None, Tensor | None, str]
States = tuple[int, torch.dtype, torch.device, bool]


def check_layers(op: str, states: States, head: Given, before: Given, pooler: str = "pooler") -> tuple[Layer, Layer]:
    """Raise unless a head, and a layer before it of the name ``pooler``, fit states; that layer and the head."""
    dtype = states[1]
    if dtype not in _backend.DTYPES:
        raise TypeError(f"{op}: hidden must be float32, bfloat16 or float16, got {dtype}")
    first = _NO_LAYER
    if before[0] is not None:
        assert head[0] is not None
        first = _check_layer(op, f"{pooler}_", "activation", before, states)
        states = first[0], *states[1:]
        if before[0].dtype is not head[0].dtype:
            raise TypeError(f"{op}: {pooler}_weight must be {head[0].dtype} like weight, got {before[0].dtype}")
    else:
        if before[1] is not None:
            raise ValueError(f"{op}: {pooler}_bias needs a {pooler}_weight, got none")
        if before[2] not in ACTIVATIONS:
            raise _no_activation(op, "activation", before[2])
    return first, _check_layer(op, "", "final", head, states)


def _check_layer(op: str, prefix: str, activation: str, layer: Given, states: States) -> Layer:
    (weight, bias, name), (inputs, wanted, device, addressed) = layer, states
    assert weight is not None
    shape, dtype = weight.shape, weight.dtype
    if len(shape) != 2 or shape[1] != inputs or shape[0] < 1:
        raise ValueError(f"{op}: {prefix}weight must have shape [V, {inputs}] with V >= 1, got {list(shape)}")
    if (dtype is not _float and dtype is not wanted) or weight.device != device:
        raise TypeError(f"{op}: {prefix}weight must be float32 or {wanted} on {device}, got {dtype} on {weight.device}")
    outputs, (row, unit) = shape[0], weight.stride()
    if inputs > 1 and unit != 1:
        raise ValueError(f"{op}: {prefix}weight must have unit stride along its rows, got strides {(row, unit)}")
    of_bias = NO_VECTOR
    if bias is not None:
        of_bias = _backend.check_vector(op, f"{prefix}bias", bias, outputs, wanted, device, addressed)
    if name not in ACTIVATIONS:
        raise _no_activation(op, activation, name)
    at = weight.data_ptr() if addressed else 0
    return (outputs, inputs, ACTIVATIONS[name], at, _backend.DTYPES[dtype], row) + of_bias  # noqa: RUF005 it is faster


def _no_activation(op: str, name: str, activation: str) -> ValueError:
    return ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _forward(*args: Any) -> Tensor:
    return _launch(args, _check("small_head", "pooler", args, _backend.kernels(args[0].device) is not None))


def _launch(args: tuple[Any, ...], facts: tuple[Layer, Layer, Vector, Vector]) -> Tensor:
    (hidden, weight, bias, pooler_weight, pooler_bias, activation, final, norm, norm_weight, norm_bias, eps) = args
    device = hidden.device
    kernels = _backend.kernels(device)
    if kernels is None:
        _backend.warn_fallback("small_head", device)
        return reference.small_head(
            hidden, weight, bias, pooler_weight=pooler_weight, pooler_bias=pooler_bias, activation=activation,
            final=final, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        )  # fmt: skip
    pooler, head, gain, shift = facts
    (n, d), (step, unit) = hidden.shape, hidden.stride()
    out = _empty(n, head[0], dtype=_float, device=device)  # a tuple of sizes would take it half a microsecond more
    if n == 0:
        return out
    if d > 1 and unit != 1:
        hidden, step = hidden.contiguous(), d
    where = _backend.place(device)
    if not hidden.is_cpu:
        workspace = _empty(kernels.small_head_workspace(head[4], n, d, pooler[0]), dtype=torch.uint8, device=device)
        where = workspace.data_ptr(), *where
    kernels.small_head(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], step, n, d, _backend.NORMS[norm],
        gain, shift, eps, pooler, head, out.data_ptr(), *where,
    )  # fmt: skip
    return out


def _saturation(hidden: Tensor, previous: Tensor) -> Tensor:
    kernels = _backend.kernels(hidden.device)
    if kernels is None:
        _backend.warn_fallback("saturation", hidden.device)
        return reference.saturation(hidden, previous)
    n, d = hidden.shape
    a, b = (t if d <= 1 or t.stride(1) == 1 else t.contiguous() for t in (hidden, previous))
    out = torch.empty(n, dtype=torch.float32, device=hidden.device)
    if n == 0:
        return out
    codes, place = _backend.DTYPES, _backend.place(hidden.device) if hidden.is_cuda else ()
    kernels.saturation(a.data_ptr(), codes[a.dtype], a.stride(0), b.data_ptr(), codes[b.dtype], b.stride(0), n, d,
                       out.data_ptr(), *place)  # fmt: skip
    return out


def _fake(hidden: Tensor, weight: Tensor, *args: object) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)


def _fake_saturation(hidden: Tensor, previous: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


_library.define("small_head", _SCHEMA, _forward, _fake)
_library.define("saturation", "(Tensor hidden, Tensor previous) -> Tensor", _saturation, _fake_saturation, inputs=2)
