"""The terms of objectives: functions of logits, with gradients written by hand, and of states.

With h(e) the logits after layer e, h(L) those at full depth, p(e) = softmax h(e), and means over the N labelled rows of
a batch:

======================= =====================================================================================
`CrossEntropy`          sum over e of w(e) * mean(-log p(e)[label])
`Distillation`          sum over exits of mean(KL(p(L) || p(e))), or of mean(KL(p(e) || p(L))); no gradient to h(L)
`ProbeLoss`             sum over exits of the mean over both classes of mean(binary cross-entropy) in the class
`LayerwiseDistillation` sum over exits of mean((state(e) - state(L))^2) with states of root mean square one
======================= =====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.heads import ExitHeads, rms_normalized

__all__ = [
    "CrossEntropy",
    "Depth",
    "Distillation",
    "LayerwiseDistillation",
    "LogitTerm",
    "ProbeLoss",
    "StateTerm",
    "depth_weights",
]


class Depth(NamedTuple):
    """What one depth predicts from.

    Attributes
    ----------
    raw : Tensor
        [N, D] state after the layer.
    state : Tensor
        [N, D] the state that the head reads: translated and normalised.
    weight : Tensor
        [V, D] of the head.
    bias : Tensor or None
        [V] of the head.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Depth
    >>> hidden, norm, head = torch.randn(4, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 10, bias=False)
    >>> depth = Depth(hidden, norm(hidden), head.weight)
    >>> depth.state.shape, depth.bias
    (torch.Size([4, 8]), None)
    """

    raw: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor | None = None


class LogitTerm(Protocol):
    """A term that is a sum over rows of a function of their logits.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Depth, Objective
    >>> class ConfidencePenalty:
    ...     needs_labels = False
    ...
    ...     def rows(self, log_p, p, labels):
    ...         gradients = {e: p[e] * (log_p[e] - (p[e] * log_p[e]).sum(-1, keepdim=True)) for e in p}
    ...         return sum((p[e] * log_p[e]).sum() for e in p), gradients
    >>> depths = {e: Depth(h := torch.zeros(4, 8), h, torch.randn(10, 8)) for e in (1, 3)}
    >>> Objective(ConfidencePenalty())(depths, None)[0]  # minus the entropy: log 10 at each of two depths
    tensor(-4.6052)
    """

    needs_labels: bool

    def rows(
        self, log_p: Mapping[int, Tensor], p: Mapping[int, Tensor], labels: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Sum of the term over n rows and its gradients with respect to their logits.

        Parameters
        ----------
        log_p : Mapping[int, Tensor]
            [n, V] float32 log-probabilities by depth; the deepest one is full depth.
        p : Mapping[int, Tensor]
            Their exponentials, which all terms share and none changes.
        labels : Tensor or None
            [n] int64.

        Returns
        -------
        value : Tensor
            Scalar, the sum over the rows.
        gradients : dict[int, Tensor]
            [n, V] by depth, where it is not zero.
        """


class StateTerm(Protocol):
    """A term on states, differentiated by autograd.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Depth, Distillation, Objective
    >>> class Size:
    ...     def __call__(self, depths, agrees, heads):
    ...         return 0.01 * sum(depths[e].raw.square().mean() for e in agrees)
    >>> depths = {e: Depth(h := torch.ones(4, 8), h, torch.ones(10, 8)) for e in (1, 3)}
    >>> Objective(Distillation(), Size())(depths, None)[0]
    tensor(0.0100)
    """

    def __call__(self, depths: Mapping[int, Depth], agrees: Mapping[int, Tensor], heads: ExitHeads | None) -> Tensor:
        """Scalar value; `agrees` holds for each exit [N] whether its token is the full-depth one."""


def depth_weights(kind: str, depths: Sequence[int]) -> dict[int, float]:
    """Weights of a cross-entropy over depths.

    Parameters
    ----------
    kind : str
        ``sum``: one for each depth. ``depth``: proportional to the number of layers run and of sum one, as CALM
        trains (Schuster et al., 2022, arXiv:2207.07061, equation 6). ``final``: full depth alone.
    depths : sequence of int
        0-based layers after which there is a loss; the largest is full depth.

    Examples
    --------
    >>> from exeunt.training import depth_weights
    >>> depth_weights("depth", [0, 2])
    {0: 0.25, 2: 0.75}
    """
    if kind == "sum":
        return dict.fromkeys(depths, 1.0)
    if kind == "depth":
        total = sum(depth + 1 for depth in depths)
        return {depth: (depth + 1) / total for depth in depths}
    if kind == "final":
        return {max(depths): 1.0}
    raise ValueError(f"weights over depths must be 'sum', 'depth' or 'final', got {kind!r}")


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the labels at several depths.

    Attributes
    ----------
    weights : Mapping[int, float]
        By depth, for example from `depth_weights`; a depth that is not named has no loss.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import CrossEntropy
    >>> log_p = {3: torch.zeros(1, 4).log_softmax(-1)}
    >>> p = {3: log_p[3].exp()}
    >>> value, gradients = CrossEntropy({3: 1.0}).rows(log_p, p, torch.tensor([2]))
    >>> value, gradients[3]
    (tensor(1.3863), tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]]))
    """

    weights: Mapping[int, float]
    needs_labels = True

    def rows(
        self, log_p: Mapping[int, Tensor], p: Mapping[int, Tensor], labels: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `LogitTerm`."""
        assert labels is not None
        value = torch.zeros((), device=labels.device)
        gradients = {}
        for depth, weight in self.weights.items():
            value = value - weight * log_p[depth].gather(1, labels[:, None]).sum()
            gradients[depth] = p[depth] * weight
            gradients[depth].scatter_add_(1, labels[:, None], p[depth].new_full((len(labels), 1), -weight))
        return value, gradients


@dataclass(frozen=True)
class Distillation:
    """Kullback-Leibler divergence between full depth and each exit; full depth is the teacher and gets no gradient.

    Attributes
    ----------
    weight : float, default 1.0
    reverse : bool, default False
        False: KL(full depth || exit), which covers all that full depth may say. True: KL(exit || full depth), which
        says only what full depth would.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Distillation
    >>> same = torch.randn(2, 8).log_softmax(-1)
    >>> Distillation().rows({1: same, 5: same}, {1: same.exp(), 5: same.exp()}, None)[0]
    tensor(0.)
    """

    weight: float = 1.0
    reverse: bool = False
    needs_labels = False

    def rows(
        self, log_p: Mapping[int, Tensor], p: Mapping[int, Tensor], labels: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """See `LogitTerm`."""
        final = max(log_p)
        log_q, q = log_p[final], p[final]
        value = q.new_zeros(())
        gradients = {}
        for depth in (d for d in log_p if d != final):
            if self.reverse:
                ratio = log_p[depth] - log_q
                each = (p[depth] * ratio).sum(-1, keepdim=True)
                value = value + self.weight * each.sum()
                gradients[depth] = (ratio - each).mul_(p[depth]).mul_(self.weight)
            else:
                value = value + self.weight * (log_q - log_p[depth]).mul_(q).sum()
                gradients[depth] = (p[depth] - q).mul_(self.weight)
        return value, gradients


@dataclass(frozen=True)
class ProbeLoss:
    """Binary cross-entropy of each exit's probe against "the exit's token is the full-depth one", classes balanced.

    The mean within a class is taken before the mean over classes: a probe that always says yes at an exit that is
    right nine times of ten gains nothing. Exits without a probe have no loss; the probe reads states as they are and
    sends no gradient into the model.

    Attributes
    ----------
    weight : float, default 1.0
    balanced : bool, default True
        False: plain mean over the rows, after which the probe's value is a probability.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import ExitHead, ExitHeads, Probe
    >>> from exeunt.training import Depth, ProbeLoss
    >>> heads = ExitHeads({1: ExitHead(probe=Probe(8))})  # a fresh probe answers 0.5
    >>> depths = {1: Depth(h := torch.randn(3, 8), h, torch.randn(10, 8))}
    >>> round(ProbeLoss()(depths, {1: torch.tensor([True, True, False])}, heads).item(), 3)
    0.693
    """

    weight: float = 1.0
    balanced: bool = True

    def __call__(self, depths: Mapping[int, Depth], agrees: Mapping[int, Tensor], heads: ExitHeads | None) -> Tensor:
        """See `StateTerm`."""
        losses = []
        for depth, agree in agrees.items():
            probe = heads[depth].probe if heads is not None and depth in heads else None
            if probe is not None:
                each = F.binary_cross_entropy_with_logits(
                    probe.logit(depths[depth].raw.detach()), agree.float(), reduction="none"
                )
                classes = [each[agree], each[~agree]] if self.balanced else [each]
                losses.append(torch.stack([c.mean() for c in classes if len(c)]).mean())
        if not losses:
            raise ValueError("objective 'probe' needs exit heads with a probe, got none")
        return self.weight * torch.stack(losses).sum()


@dataclass(frozen=True)
class LayerwiseDistillation:
    """Mean squared difference between the states that the head reads at an exit and at full depth.

    Both are brought to a root mean square of one first; full depth is the teacher and gets no gradient.

    Attributes
    ----------
    weight : float, default 1.0

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Depth, LayerwiseDistillation
    >>> head, final = torch.randn(10, 8), torch.randn(4, 8)
    >>> same, opposite = ({1: Depth(h, h, head), 3: Depth(final, final, head)} for h in (2 * final, -final))
    >>> [round(LayerwiseDistillation()(depths, {}, None).item(), 3) for depths in (same, opposite)]
    [0.0, 4.0]
    """

    weight: float = 1.0

    def __call__(self, depths: Mapping[int, Depth], agrees: Mapping[int, Tensor], heads: ExitHeads | None) -> Tensor:
        """See `StateTerm`."""
        final = max(depths)
        target = rms_normalized(depths[final].state.detach())
        differences = [(rms_normalized(d.state) - target).square().mean() for e, d in depths.items() if e != final]
        return self.weight * torch.stack(differences).sum()
