"""Objectives: what training makes small, as terms that add up.

Terms on logits have gradients written by hand: a batch's logits exist for a few rows at a time, while autograd would
keep several [rows, vocabulary] tensors for every exit. Terms on states are a few lines of plain torch. With h(e) the
logits after layer e, h(L) those at full depth, p(e) = softmax h(e), and means over the N labelled rows of a batch:

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
from typing import Any, NamedTuple, Protocol

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
    "Objective",
    "ProbeLoss",
    "StateTerm",
    "depth_weights",
    "parse",
]

ROWS = 128  # whose logits exist at a time: they stay near the cache
IGNORED = -100  # the label of a row that does not count


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
    """

    raw: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor | None = None


class LogitTerm(Protocol):
    """A term that is a sum over rows of a function of their logits."""

    needs_labels: bool

    def rows(self, log_p: Mapping[int, Tensor], labels: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
        """Sum of the term over n rows and its gradients with respect to their logits.

        Parameters
        ----------
        log_p : Mapping[int, Tensor]
            [n, V] float32 log-probabilities by depth; the deepest one is full depth.
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
    """A term on states, differentiated by autograd."""

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
    >>> value, gradients = CrossEntropy({3: 1.0}).rows(log_p, torch.tensor([2]))
    >>> value, gradients[3]
    (tensor(1.3863), tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]]))
    """

    weights: Mapping[int, float]
    needs_labels = True

    def rows(self, log_p: Mapping[int, Tensor], labels: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
        """See `LogitTerm`."""
        assert labels is not None
        value = torch.zeros((), device=labels.device)
        gradients = {}
        for depth, weight in self.weights.items():
            value = value - weight * log_p[depth].gather(1, labels[:, None]).sum()
            p = log_p[depth].exp()
            p.scatter_add_(1, labels[:, None], p.new_full((len(labels), 1), -1.0))
            gradients[depth] = p.mul_(weight)
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
    >>> Distillation().rows({1: same, 5: same}, None)[0]
    tensor(0.)
    """

    weight: float = 1.0
    reverse: bool = False
    needs_labels = False

    def rows(self, log_p: Mapping[int, Tensor], labels: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
        """See `LogitTerm`."""
        final = max(log_p)
        log_q = log_p[final]
        q = log_q.exp()
        value = q.new_zeros(())
        gradients = {}
        for depth in (d for d in log_p if d != final):
            p = log_p[depth].exp()
            if self.reverse:
                ratio = log_p[depth] - log_q
                each = (p * ratio).sum(-1, keepdim=True)
                value = value + self.weight * each.sum()
                gradients[depth] = self.weight * p * (ratio - each)
            else:
                value = value + self.weight * (q * (log_q - log_p[depth])).sum()
                gradients[depth] = self.weight * (p - q)
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
    """

    weight: float = 1.0

    def __call__(self, depths: Mapping[int, Depth], agrees: Mapping[int, Tensor], heads: ExitHeads | None) -> Tensor:
        """See `StateTerm`."""
        final = max(depths)
        target = rms_normalized(depths[final].state.detach())
        differences = [(rms_normalized(d.state) - target).square().mean() for e, d in depths.items() if e != final]
        return self.weight * torch.stack(differences).sum()


class Objective:
    """Terms that add up, evaluated together: the logits of a row are computed once for all of them.

    Parameters
    ----------
    *terms : LogitTerm or StateTerm

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import CrossEntropy, Depth, Distillation, Objective, depth_weights
    >>> head = torch.randn(10, 8)
    >>> depths = {e: Depth(h := torch.randn(4, 8), h, head) for e in (1, 3)}
    >>> objective = Objective(CrossEntropy(depth_weights("sum", [1, 3])), Distillation(0.5))
    >>> loss, agrees = objective(depths, torch.tensor([1, 2, 3, 4]))
    >>> loss.shape, agrees[1].shape
    (torch.Size([]), torch.Size([4]))
    """

    def __init__(self, *terms: LogitTerm | StateTerm) -> None:
        if not terms:
            raise ValueError("an objective needs at least one term, got none")
        self.terms = terms
        self._on_logits: list[Any] = [term for term in terms if hasattr(term, "rows")]
        self._on_states: list[Any] = [term for term in terms if not hasattr(term, "rows")]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    def __call__(
        self, depths: Mapping[int, Depth], labels: Tensor | None, heads: ExitHeads | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss of a batch.

        Parameters
        ----------
        depths : Mapping[int, Depth]
            By 0-based layer; the deepest is full depth.
        labels : Tensor, optional
            [N] int64, -100 where there is none.
        heads : ExitHeads, optional
            Whose probes a `ProbeLoss` trains.

        Returns
        -------
        loss : Tensor
            Scalar, differentiable.
        agrees : dict[int, Tensor]
            For each exit [M] bool: whether its token is that of full depth, for the M rows that have a label (all,
            without labels).

        Raises
        ------
        ValueError
            If a term needs labels and there are none.
        """
        if labels is None and any(term.needs_labels for term in self._on_logits):
            raise ValueError("objective 'ce' needs labels, got data without any")
        if labels is not None:
            counted = labels != IGNORED
            if not counted.any():
                raise ValueError("objective 'ce' needs labels, got a batch in which every label is missing")
            if not counted.all():
                labels = labels[counted]
                depths = {e: d._replace(raw=d.raw[counted], state=d.state[counted]) for e, d in depths.items()}
        flat = [tensor for depth in depths.values() for tensor in (depth.state, depth.weight, depth.bias)]
        loss, tokens = _LogitLoss.apply(tuple(depths), self._on_logits, labels, *flat)
        final = max(depths)
        found = dict(zip(depths, tokens, strict=True))
        agrees = {depth: found[depth] == found[final] for depth in depths if depth != final}
        for term in self._on_states:
            loss = loss + term(depths, agrees, heads)
        return loss, agrees


class _LogitLoss(torch.autograd.Function):
    """Sum of logit terms, mean over rows, `ROWS` rows at a time; the gradients are made along with the value."""

    @staticmethod
    def forward(
        ctx: Any, names: tuple[int, ...], terms: list[LogitTerm], labels: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        depths = {name: flat[3 * i : 3 * i + 3] for i, name in enumerate(names)}
        wanted = {name: ctx.needs_input_grad[3 + 3 * i : 6 + 3 * i] for i, name in enumerate(names)}
        any_state = flat[0]
        assert any_state is not None
        # bfloat16 states (autocast) meet bfloat16 weights; sums over rows stay float32.
        weights = {name: d[1].to(d[0].dtype) for name, d in depths.items()}  # type: ignore[union-attr]
        grads: dict[int, list[Any]] = {
            name: [
                torch.empty_like(state) if need[0] else None,  # type: ignore[arg-type]
                torch.zeros_like(weight, dtype=torch.float32) if need[1] else None,  # type: ignore[arg-type]
                torch.zeros_like(bias, dtype=torch.float32) if need[2] else None,  # type: ignore[arg-type]
            ]
            for name, (state, weight, bias) in depths.items()
            for need in (wanted[name],)
        }
        count = len(any_state)
        value = torch.zeros((), device=any_state.device)
        tokens = torch.empty(len(names), count, dtype=torch.int64, device=any_state.device)
        for start in range(0, count, ROWS):
            rows = slice(start, start + ROWS)
            log_p = {}
            for i, (name, (state, _, bias)) in enumerate(depths.items()):
                logits = F.linear(state[rows], weights[name]).float()  # type: ignore[index]
                if bias is not None:
                    logits += bias
                tokens[i, rows] = logits.argmax(-1)
                log_p[name] = logits.log_softmax(-1)
            by_depth: dict[int, Tensor] = {}
            for term in terms:
                part, gradients = term.rows(log_p, None if labels is None else labels[rows])
                value += part
                for name, gradient in gradients.items():
                    by_depth[name] = by_depth[name].add_(gradient) if name in by_depth else gradient
            for name, gradient in by_depth.items():
                on_state, on_weight, on_bias = grads[name]
                gradient = gradient.div_(count)
                if on_bias is not None:
                    on_bias += gradient.sum(0)
                low = gradient.to(weights[name].dtype)
                if on_state is not None:
                    on_state[rows] = low @ weights[name]
                if on_weight is not None:
                    on_weight += low.t() @ depths[name][0][rows]  # type: ignore[index]
            for name in names:
                if name not in by_depth and grads[name][0] is not None:
                    grads[name][0][rows] = 0
        ctx.grads = [
            None if g is None else g.to(t.dtype)  # type: ignore[union-attr]
            for name in names
            for g, t in zip(grads[name], depths[name], strict=True)
        ]
        ctx.mark_non_differentiable(tokens)
        return value / count, tokens

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *(None if g is None else g * upstream[0] for g in ctx.grads))


TERMS = {
    "ce": "cross-entropy of the labels; ce:depth weighs by layers run (default), ce:sum evenly, ce:final full depth",
    "kl": "KL(full depth || exit)",
    "reverse-kl": "KL(exit || full depth)",
    "probe": "the probes, classes balanced",
    "layer": "squared difference to the full-depth state",
}


def parse(text: str, depths: Sequence[int]) -> Objective:
    """An objective from its terms, as the command line writes them.

    Parameters
    ----------
    text : str
        Names of `TERMS` joined by ``+``, each with a factor or without: ``"ce:depth + 0.5*kl"``.
    depths : sequence of int
        Exits and full depth.

    Raises
    ------
    ValueError
        At an unknown term or factor.

    Examples
    --------
    >>> from exeunt.training import parse
    >>> parse("kl + 0.5*probe", [1, 3])
    Distillation(weight=1.0, reverse=False) + ProbeLoss(weight=0.5, balanced=True)
    """
    terms: list[LogitTerm | StateTerm] = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = float("nan")
        name, _, kind = name.strip().partition(":")
        if not weight > 0 or name not in TERMS or (kind and name != "ce"):
            raise ValueError(f"objective terms must be {', '.join(TERMS)} with positive factors, got {part.strip()!r}")
        if name == "ce":
            weights = depth_weights(kind or "depth", depths)
            terms.append(CrossEntropy({depth: weight * w for depth, w in weights.items()}))
        elif name == "probe":
            terms.append(ProbeLoss(weight))
        elif name == "layer":
            terms.append(LayerwiseDistillation(weight))
        else:
            terms.append(Distillation(weight, reverse=name == "reverse-kl"))
    return Objective(*terms)
