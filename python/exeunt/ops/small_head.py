"""Heads of a few classes, probes and saturation: the checks that read no vocabulary, each in one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from exeunt import reference
from exeunt.ops import _backend, _library

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
    args = (hidden, weight[None], None if bias is None else bias.reshape(1), hidden_weight, hidden_bias, activation,
            "sigmoid", norm, norm_weight, norm_bias, eps)  # fmt: skip
    return _run("probe", "hidden", args).view(-1)


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
    _check(op, pooler, *args)
    hidden, weight = args[:2]
    if _backend.direct(hidden, weight) and not (hidden.requires_grad and torch.is_grad_enabled()):
        return _forward(*args)
    return torch.ops.exeunt.small_head(*args)


def _check(
    op: str,
    pooler: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooler_weight: Tensor | None,
    pooler_bias: Tensor | None,
    activation: str,
    final: str,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must have shape [N, D], got {list(hidden.shape)}")
    check_layers(op, hidden, weight, bias, pooler_weight, pooler_bias, pooler)
    d = hidden.shape[1]
    if norm_weight is not None:
        _backend.check_vector(op, "norm_weight", norm_weight, d, hidden)
    if norm_bias is not None:
        _backend.check_vector(op, "norm_bias", norm_bias, d, hidden)
    check_activation(op, "activation", activation)
    check_activation(op, "final", final)
    if norm not in _backend.NORMS:
        raise ValueError(f"{op}: norm must be None, 'rms' or 'layer', got {norm!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def check_activation(op: str, name: str, activation: str) -> None:
    """Raise unless it is one that kernels know."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_layers(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooler_weight: Tensor | None,
    pooler_bias: Tensor | None,
    pooler: str = "pooler",
) -> None:
    """Raise unless a head, and a layer before it of that name, fit states [..., D]."""
    if hidden.dtype not in _backend.DTYPES:
        raise TypeError(f"{op}: hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    inner = hidden.shape[-1]
    if pooler_weight is not None:
        _check_matrix(op, f"{pooler}_weight", pooler_weight, inner, hidden)
        inner = pooler_weight.shape[0]
        if pooler_weight.dtype != weight.dtype:
            raise TypeError(f"{op}: {pooler}_weight must be {weight.dtype} like weight, got {pooler_weight.dtype}")
    elif pooler_bias is not None:
        raise ValueError(f"{op}: {pooler}_bias needs a {pooler}_weight, got none")
    _check_matrix(op, "weight", weight, inner, hidden)
    if bias is not None:
        _backend.check_vector(op, "bias", bias, weight.shape[0], hidden)
    if pooler_bias is not None:
        _backend.check_vector(op, f"{pooler}_bias", pooler_bias, inner, hidden)


def _check_matrix(op: str, name: str, weight: Tensor, inputs: int, hidden: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != inputs or weight.shape[0] < 1:
        raise ValueError(f"{op}: {name} must have shape [V, {inputs}] with V >= 1, got {list(weight.shape)}")
    if weight.dtype not in (torch.float32, hidden.dtype) or weight.device != hidden.device:
        raise TypeError(
            f"{op}: {name} must be float32 or {hidden.dtype} on {hidden.device}, got {weight.dtype} on {weight.device}"
        )
    if inputs > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: {name} must have unit stride along its rows, got strides {weight.stride()}")


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooler_weight: Tensor | None,
    pooler_bias: Tensor | None,
    activation: str,
    final: str,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    kernels = _backend.kernels(hidden.device)
    if kernels is None:
        _backend.warn_fallback("small_head", hidden.device)
        return reference.small_head(
            hidden, weight, bias, pooler_weight=pooler_weight, pooler_bias=pooler_bias, activation=activation,
            final=final, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        )  # fmt: skip
    n, d = hidden.shape
    out = torch.empty((n, weight.shape[0]), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return out
    if d > 1 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    vector, place = _backend.vector_arg, _backend.place(hidden.device)
    pooler = layer_arg(pooler_weight, pooler_bias, activation)
    if hidden.is_cpu:
        workspace = workspace_for(d, pooler, n, *place)
    else:
        size = kernels.small_head_workspace(_backend.DTYPES[weight.dtype], n, d, pooler[2])
        workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
    kernels.small_head(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), n, d, _backend.NORMS[norm],
        vector(norm_weight), vector(norm_bias), eps, pooler, layer_arg(weight, bias, final),
        out.data_ptr(), workspace.data_ptr(), *place,
    )  # fmt: skip
    return out


Layer = tuple[tuple[int, int, int, int, int, int, int], tuple[int, int, int], int, int, int]
_NO_LAYER: Layer = ((0, 0, 0, 0, 0, 0, 0), (0, 0, 0), 0, 0, 0)


def layer_arg(weight: Tensor | None, bias: Tensor | None, activation: str) -> Layer:
    """A layer, or none, as the binding wants it."""
    if weight is None:
        return _NO_LAYER
    v, inputs = weight.shape
    return _backend.weight_arg(weight), _backend.vector_arg(bias), v, inputs, ACTIVATIONS[activation]


def workspace_for(width: int, pooler: Layer, rows: int, threads: int) -> Tensor:
    """Scratch of the kernel for so many rows of that width."""
    assert _backend.cpu is not None
    return _backend.scratch(_backend.cpu.small_head_workspace(width, pooler[2], rows, threads))


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
