"""Exit heads that read one layer: linear, pooled, attending."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt.classifier_heads.base import ClassifierHead, View, pooled
from exeunt.heads import Probe

__all__ = ["AttentionHead", "LinearHead", "PoolerHead"]


class LinearHead(ClassifierHead):
    """One linear layer on the pooled state (SDN, BERxiT, CALM's setting for classifiers).

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import LinearHead, View
    >>> LinearHead(8, 3)(View(torch.randn(2, 5, 8), None, 0, {})).shape
    torch.Size([2, 3])
    """

    plain = True

    def features(self, view: View) -> Tensor:
        """The pooled state."""
        return self.pooled(view)


class PoolerHead(ClassifierHead):
    """A pooler (D to D, tanh) and a linear layer: DeeBERT's off-ramp; with a shared pooler, PABEE's head.

    Parameters
    ----------
    hidden_size, classes, pooling, probe
        As for all heads.
    width : int, optional
        What the pooler makes of D; default D. CATs has 32.
    pooler : nn.Linear, optional
        One that several heads share; by default the head has its own.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from exeunt.classifier_heads import ClassifierHeads, PoolerHead, View
    >>> shared = nn.Linear(8, 8)
    >>> heads = ClassifierHeads({layer: PoolerHead(8, 3, pooler=shared) for layer in (0, 1)})
    >>> heads[0](View(torch.randn(2, 5, 8), None, 0, {})).shape, heads[0].pooler is heads[1].pooler
    (torch.Size([2, 3]), True)
    """

    plain = True

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, width: int | None = None,
        pooler: nn.Linear | None = None, probe: Probe | None = None,
    ) -> None:  # fmt: skip
        width = pooler.out_features if pooler is not None else width or hidden_size
        super().__init__(hidden_size, classes, pooling, width=width, probe=probe)
        self.pooler = nn.Linear(hidden_size, width) if pooler is None else pooler

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {**super().options(), "width": self.pooler.out_features}

    def features(self, view: View) -> Tensor:
        """The pooler's output."""
        return torch.tanh(self.pooler(self.pooled(view)))


class AttentionHead(ClassifierHead):
    """FastBERT's student: D to a narrow width, self-attention over the tokens there, pooled, a layer, the logits.

    Parameters
    ----------
    hidden_size, classes, pooling, probe
        As for all heads.
    width : int, default 128
        A multiple of ``heads``.
    heads : int, default 2

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import AttentionHead, View
    >>> AttentionHead(8, 3, width=4)(View(torch.randn(2, 5, 8), None, 0, {})).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, width: int = 128, heads: int = 2,
        probe: Probe | None = None,
    ) -> None:  # fmt: skip
        if width % heads:
            raise ValueError(f"AttentionHead: width must be a multiple of {heads} heads, got {width}")
        super().__init__(hidden_size, classes, pooling, width=width, probe=probe)
        self.width, self.heads = width, heads
        self.down, self.inputs = nn.Linear(hidden_size, width), nn.Linear(width, 3 * width)
        self.outputs, self.dense = nn.Linear(width, width), nn.Linear(width, width)

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {**super().options(), "width": self.width, "heads": self.heads}

    def features(self, view: View) -> Tensor:
        """The pooled outcome of the attention."""
        n, length = view.hidden.shape[:2]
        x = torch.tanh(self.down(view.hidden))
        q, k, v = self.inputs(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if view.mask is None else (view.mask != 0)[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(n, length, self.width)
        return torch.tanh(self.dense(pooled(self.outputs(attended), view.mask, self.pooling)))
