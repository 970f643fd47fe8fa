"""Objectives: what training makes small, as terms that add up (:mod:`exeunt.training.terms`).

Terms on logits are evaluated together and for a few rows at a time: autograd would keep several [rows, vocabulary]
tensors for every exit. Where the vocabulary is what costs, an objective reads a part of it, drawn anew for each batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.heads import ExitHeads
from exeunt.training.terms import (
    CrossEntropy,
    Depth,
    Distillation,
    LayerwiseDistillation,
    LogitTerm,
    ProbeLoss,
    StateTerm,
    depth_weights,
)

__all__ = ["TERMS", "Objective", "parse"]

ROWS = 128  # whose logits exist at a time: they stay near the cache
IGNORED = -100  # the label of a row that does not count
LIKELY = 8  # a part of the vocabulary holds every token that some row finds at least 1/8 as likely as its likeliest


class Objective:
    """Terms that add up, evaluated together: the logits of a row are computed once for all of them.

    Parameters
    ----------
    *terms : LogitTerm or StateTerm
    sample : int, optional
        Where gradients are wanted, read not the whole vocabulary but the tokens that are likely at full depth, the
        labels, and so many of the others, drawn anew for each batch from torch's default generator. A drawn token
        stands for as many as there are others for each drawn one, so that every sum of exp(logits) is met on average
        (Jean et al., 2015, arXiv:1412.2007, with a uniform proposal). Whether tokens agree is judged among those read.

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

    def __init__(self, *terms: LogitTerm | StateTerm, sample: int | None = None) -> None:
        if not terms:
            raise ValueError("an objective needs at least one term, got none")
        if sample is not None and sample < 1:
            raise ValueError(f"sample must be 1 token or more, got {sample}")
        self.terms, self.sample = terms, sample
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
        final, stands_for = max(depths), None
        if self.sample is not None and torch.is_grad_enabled():
            part, stands_for = drawn(depths[final], labels, self.sample)
            weights = {id(d.weight): d.weight[part] for d in depths.values()}  # most often one
            depths = {
                e: d._replace(weight=weights[id(d.weight)], bias=None if d.bias is None else d.bias[part])
                for e, d in depths.items()
            }
            labels = None if labels is None else torch.searchsorted(part, labels)
        flat = [tensor for depth in depths.values() for tensor in (depth.state, depth.weight, depth.bias)]
        loss, tokens = _LogitLoss.apply(tuple(depths), self._on_logits, labels, stands_for, *flat)
        found = dict(zip(depths, tokens, strict=True))
        agrees = {depth: found[depth] == found[final] for depth in depths if depth != final}
        for term in self._on_states:
            loss = loss + term(depths, agrees, heads)
        return loss, agrees


@torch.no_grad()
def drawn(full: Depth, labels: Tensor | None, sample: int) -> tuple[Tensor, Tensor]:
    """A part of the vocabulary: tokens [M] in ascending order, and [M] the logarithm of how many each stands for."""
    sure = torch.zeros(len(full.weight), dtype=torch.bool, device=full.state.device)
    weight = full.weight.to(full.state.dtype)
    bias = None if full.bias is None else full.bias.to(full.state.dtype)
    for state in full.state.split(ROWS):
        logits = F.linear(state, weight, bias)
        sure |= (logits >= logits.amax(-1, keepdim=True) - math.log(LIKELY)).any(0)
    if labels is not None:
        sure[labels] = True
    others = (~sure).nonzero()[:, 0]
    some = others[torch.randperm(len(others), device=others.device)[:sample]]
    stands_for = torch.zeros(len(sure), device=others.device)
    if len(some):
        stands_for[some] = math.log(len(others) / len(some))
    sure[some] = True
    part = sure.nonzero()[:, 0]
    return part, stands_for[part]


class _LogitLoss(torch.autograd.Function):
    """Sum of logit terms, mean over rows, `ROWS` rows at a time; the gradients are made along with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        names: tuple[int, ...],
        terms: list[LogitTerm],
        labels: Tensor | None,
        stands_for: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        depths = {name: flat[3 * i : 3 * i + 3] for i, name in enumerate(names)}
        wanted = {name: ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i] for i, name in enumerate(names)}
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
                tokens[i, rows] = logits.max(-1).indices  # argmax takes three times as long
                if stands_for is not None:
                    logits += stands_for
                log_p[name] = logits.log_softmax(-1)
            p = {name: part.exp() for name, part in log_p.items()}
            by_depth: dict[int, Tensor] = {}
            for term in terms:
                part, gradients = term.rows(log_p, p, None if labels is None else labels[rows])
                value += part
                for name, gradient in gradients.items():
                    by_depth[name] = by_depth[name].add_(gradient) if name in by_depth else gradient
            for name, gradient in by_depth.items():
                on_state, on_weight, on_bias = grads[name]
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
            None if g is None else g.div_(count).to(t.dtype)  # type: ignore[union-attr]
            for name in names
            for g, t in zip(grads[name], depths[name], strict=True)
        ]
        ctx.mark_non_differentiable(tokens)
        return value / count, tokens

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return (None, None, None, None, *(None if g is None else g * upstream[0] for g in ctx.grads))


TERMS = {
    "ce": "cross-entropy of the labels; ce:depth weighs by layers run (default), ce:sum evenly, ce:final full depth",
    "kl": "KL(full depth || exit)",
    "reverse-kl": "KL(exit || full depth)",
    "probe": "the probes, classes balanced",
    "layer": "squared difference to the full-depth state",
}


def parse(text: str, depths: Sequence[int], sample: int | None = None) -> Objective:
    """An objective from its terms, as the command line writes them.

    Parameters
    ----------
    text : str
        Names of `TERMS` joined by ``+``, each with a factor or without: ``"ce:depth + 0.5*kl"``.
    depths : sequence of int
        Exits and full depth.
    sample : int, optional
        See `Objective`; by default the whole vocabulary is read.

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
    return Objective(*terms, sample=sample)
