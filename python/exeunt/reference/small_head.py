"""small_head, classify, probe and saturation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.reference.exit_stats import normalised
from exeunt.stats import ExitStats

_ACTIVATIONS = {"none": lambda x: x, "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


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
    """Specification of :func:`exeunt.ops.small_head`: float64 where ``hidden`` is float64, float32 otherwise.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.reference.small_head(torch.ones(1, 2), torch.eye(2), torch.tensor([0.0, 1.0]))
    tensor([[1., 2.]])
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    x = normalised(hidden.to(dtype), norm, norm_weight, norm_bias, eps, weight.dtype)
    if pooler_weight is not None:
        x = _ACTIVATIONS[activation](F.linear(x, pooler_weight.to(dtype), cast(pooler_bias)))
        x = normalised(x, None, None, None, 0.0, weight.dtype)
    return _ACTIVATIONS[final](F.linear(x, weight.to(dtype), cast(bias)))


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
    """Specification of :func:`exeunt.ops.classify`.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.reference.classify(torch.tensor([[[1.0], [3.0], [8.0]]]), torch.ones(1, 1),
    ...                           mask=torch.tensor([[True, True, False]]))[0]
    tensor([[2.]])
    """
    if hidden.dim() == 3:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        counts = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        total = torch.where(counts[..., None], hidden.to(dtype), 0.0).sum(1)
        hidden = total / counts.sum(1, keepdim=True).clamp_min(1)
    logits = small_head(
        hidden, weight, bias, pooler_weight=pooler_weight, pooler_bias=pooler_bias, activation=activation
    )
    return logits, ExitStats.from_logits(logits)


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
    """Specification of :func:`exeunt.ops.probe`.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.reference.probe(torch.ones(1, 2), torch.zeros(2))
    tensor([0.5000])
    """
    return small_head(
        hidden, weight[None], None if bias is None else bias.reshape(1), pooler_weight=hidden_weight,
        pooler_bias=hidden_bias, activation=activation, final="sigmoid", norm=norm, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps,
    ).view(-1)  # fmt: skip


def saturation(hidden: Tensor, previous: Tensor) -> Tensor:
    """Specification of :func:`exeunt.ops.saturation`.

    Examples
    --------
    >>> import torch, exeunt
    >>> exeunt.reference.saturation(torch.ones(1, 4), torch.zeros(1, 4))
    tensor([0.])
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.cosine_similarity(hidden.to(dtype), previous.to(dtype), dim=-1, eps=1e-30).clamp(-1.0, 1.0)
