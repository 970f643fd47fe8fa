"""What exit heads of classifiers read and have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from exeunt import ops
from exeunt.heads import Probe
from exeunt.stats import ExitStats

if TYPE_CHECKING:
    from exeunt.classifier_heads.meta import MetaProbe

__all__ = ["ClassifierHead", "Judged", "View", "pooled"]


class View(NamedTuple):
    """What an exit head sees of n rows.

    Attributes
    ----------
    hidden : Tensor
        [n, S, D] states of all tokens after the layer.
    mask : Tensor or None
        [n, S], not 0 where a token counts (bool where the host is an attached encoder); None where all do.
    layer : int
        0-based.
    memory : dict of str to Tensor
        What heads of earlier layers left of these rows, rows first; to be read and added to.

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import LinearHead, View
    >>> view = View(torch.randn(2, 5, 8), mask=None, layer=3, memory={})
    >>> LinearHead(8, 3)(view).shape
    torch.Size([2, 3])
    """

    hidden: Tensor
    mask: Tensor | None
    layer: int
    memory: dict[str, Tensor]


class Judged(NamedTuple):
    """What an exit head says of n rows.

    Attributes
    ----------
    logits : Tensor
        [n, C].
    stats : ExitStats
        Of the logits.
    features : Tensor or None
        [n, width] what the logits are a linear function of, where a `MetaProbe` will ask for it.

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import LinearHead, View
    >>> with torch.no_grad():
    ...     judged = LinearHead(8, 3).judge(View(torch.randn(2, 5, 8), None, 3, {}))
    >>> judged.logits.shape, torch.equal(judged.stats.argmax, judged.logits.argmax(-1))
    (torch.Size([2, 3]), True)
    """

    logits: Tensor
    stats: ExitStats
    features: Tensor | None


def pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One state [n, D] for each text: of its first token, or the mean over the tokens that count.

    Examples
    --------
    >>> import torch
    >>> h = torch.tensor([[[1.0], [3.0], [8.0]]])
    >>> pooled(h, torch.tensor([[1, 1, 0]]), "mean"), pooled(h, None, "first")
    (tensor([[2.]]), tensor([[1.]]))
    """
    if pooling == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    weight = (mask != 0).to(hidden.dtype)
    return torch.bmm((weight / weight.sum(1, keepdim=True).clamp_min(1))[:, None], hidden)[:, 0]


class ClassifierHead(nn.Module):
    """What the heads have in common.

    Parameters
    ----------
    hidden_size : int
        Size D of the model's hidden states.
    classes : int
        Logits C; 1 for a regression.
    pooling : {"first", "mean"}
        The state of a text that probes, saturation and most heads read: of the first token, or the mean over tokens.
    width : int, optional
        Size of what ``out`` reads; default D.
    probe : Probe, optional
        Of this exit's own.

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import ClassifierHead, ClassifierHeads
    >>> class LargestHead(ClassifierHead):
    ...     def features(self, view):
    ...         seen = view.hidden
    ...         return (seen if view.mask is None else seen.masked_fill(view.mask[..., None] == 0, -torch.inf)).amax(1)
    >>> heads = ClassifierHeads({1: LargestHead(8, 3)})
    >>> heads.logits([torch.randn(2, 5, 8)] * 4, None)[1].shape
    torch.Size([2, 3])
    """

    translator = None
    plain = False  # whether it is one product, or a tanh and two, on the pooled state; each class says so for itself
    observes = False  # whether every layer has to be shown to it, not only its own
    remembers = False  # whether it builds on the exits before, so that none may be left out

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, width: int | None = None,
        probe: Probe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be 'first' or 'mean', got {pooling!r}")
        if classes < 1:
            raise ValueError(f"classes must be 1 or more, got {classes}")
        self.hidden_size, self.classes, self.pooling = hidden_size, classes, pooling
        self.out = nn.Linear(width or hidden_size, classes)
        self.probe = probe
        self.meta: MetaProbe | None = None

    def __init_subclass__(cls) -> None:
        if "features" in vars(cls) or "forward" in vars(cls):
            cls.plain = vars(cls).get("plain", False)

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {"hidden_size": self.hidden_size, "classes": self.classes, "pooling": self.pooling}

    def pooled(self, view: View) -> Tensor:
        """[n, D] states of the texts."""
        return pooled(view.hidden, view.mask, self.pooling)

    def features(self, view: View) -> Tensor:
        """What ``out`` reads, [n, width]; differentiable."""
        raise NotImplementedError

    def forward(self, view: View) -> Tensor:
        """Logits [n, C]; differentiable."""
        return self.out(self.features(view))

    def weights(self) -> dict[str, Any]:
        """Parameters of a `plain` head, as :func:`exeunt.ops.classify` takes them."""
        found = {"weight": self.out.weight, "bias": self.out.bias}
        pooler = getattr(self, "pooler", None)
        return found if pooler is None else {**found, "pooler_weight": pooler.weight, "pooler_bias": pooler.bias}

    def judge(self, view: View) -> Judged:
        """The same and what there is to know of it, for inference."""
        if self.plain and view.hidden.is_cpu:
            hidden, mask = view.hidden[:, 0], None
            if self.pooling == "mean":
                hidden, mask = view.hidden, None if view.mask is None else view.mask != 0
            logits, stats = ops.classify(hidden, mask=mask, **self.weights())
            return Judged(logits, stats, None if self.meta is None else self.features(view))
        features = self.features(view)
        logits = features.new_empty(features.shape[0], self.classes)
        stats = ops.exit_stats(features, self.out.weight, head_bias=self.out.bias, logits_out=logits)
        return Judged(logits, stats, features)
