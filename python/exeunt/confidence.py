"""Confidence measures: what an exit point sees, turned into a score in which larger means safer to leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from exeunt import ops
from exeunt.candidates import Candidates, features
from exeunt.stats import ExitStats

if TYPE_CHECKING:
    from exeunt.heads import ExitHead

__all__ = ["MEASURES", "UNSHIFTED_ENTROPY", "Confidence", "ExitPoint", "candidate_probe", "max_prob_at", "measure"]


@dataclass(frozen=True)
class ExitPoint:
    """What the n rows at one exit can be judged by.

    Attributes
    ----------
    hidden : Tensor
        [n, D] output of the exit's layer.
    previous : Tensor
        [n, D] input of the same layer.
    head : ExitHead
        What the exit has of its own (translator, probe).
    stats : ExitStats or None
        Statistics of the exit's logits, for measures with ``reads_head``.
    classes : int or None
        Number of labels (of words, in a language model), for measures that are normalised by it.
    logits : Tensor or None
        [n, C] float32, where the host has them anyway (classifiers).
    exit : int
        Index among the exits; filled in, as the following, by a recipe whose measure ``remembers``.
    earlier : Tensor or None
        [n] int64 labels of the exit before, -1 at the first.
    local : Tensor or None
        [n, k] logits of the row's candidates, for a measure that has ``candidates``.
    shown : Tensor or None
        [n, k] their probabilities at the exit before, NaN at the first; filled in by the recipe.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.confidence import ExitPoint, measure
    >>> before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> point = ExitPoint(after, before, exeunt.heads.ExitHead(), stats=None)  # the head was not read
    >>> measure("saturation").score(point)
    tensor([1., 0.])
    """

    hidden: Tensor
    previous: Tensor
    head: ExitHead
    stats: ExitStats | None
    classes: int | None = None
    logits: Tensor | None = None
    exit: int = 0
    earlier: Tensor | None = None
    local: Tensor | None = None
    shown: Tensor | None = None


@dataclass(frozen=True)
class Confidence:
    """A confidence measure.

    Attributes
    ----------
    name : str
        How recipes and the command line call it.
    low, high : float
        Range of the score; a threshold has to lie in it.
    reads_head : bool
        Whether it needs the logits' statistics, which cost one read of the head. A measure that does not lets the
        rows that leave read the head once at the end, and the rows that stay not at all.
    score : callable
        ``score(point: ExitPoint) -> Tensor`` [n] float32; NaN never exits.
    remembers : bool, default False
        Whether it reads ``point.exit`` or ``point.earlier``.
    candidates : Candidates, optional
        It reads the logits of these words alone, and a row that passes leaves only if the whole head then says one of
        them.

    Examples
    --------
    >>> import torch, exeunt
    >>> stats = exeunt.ExitStats.from_logits(torch.tensor([[0.0, 2.0, 0.0]]))
    >>> point = exeunt.confidence.ExitPoint(torch.zeros(1, 8), torch.zeros(1, 8), exeunt.heads.ExitHead(), stats)
    >>> round(float(exeunt.confidence.measure("margin").score(point)), 3)
    0.68
    """

    name: str
    low: float
    high: float
    reads_head: bool
    score: Callable[[ExitPoint], Tensor]
    remembers: bool = False
    candidates: Candidates | None = None


def _stats(point: ExitPoint) -> ExitStats:
    assert point.stats is not None  # reads_head is set
    return point.stats


def _saturation(point: ExitPoint) -> Tensor:
    return ops.saturation(point.hidden, point.previous)


def _probe(point: ExitPoint) -> Tensor:
    probe = point.head.probe
    assert probe is not None  # the recipe has checked
    inner = probe.hidden
    return ops.probe(
        point.hidden, probe.weight, probe.bias, hidden_weight=None if inner is None else inner.weight,
        hidden_bias=None if inner is None else inner.bias, norm="rms", eps=probe.eps,
    )  # fmt: skip


def _candidate_probe(point: ExitPoint) -> Tensor:
    probe = point.head.candidates
    assert probe is not None and point.local is not None and point.shown is not None  # the recipe has checked
    return probe(features(point.local, point.shown))


def candidate_probe(count: int = 4, draft: Callable[[Tensor], Tensor] | None = None) -> Confidence:
    """SpecEE's predictor as a measure, on candidates of your choice.

    Parameters
    ----------
    count, draft
        As for :class:`exeunt.candidates.Candidates`.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.confidence.candidate_probe(3).candidates.count
    3
    """
    return Confidence("candidate_probe", 0.0, 1.0, False, _candidate_probe, candidates=Candidates(count, draft))


def _normalized_entropy(point: ExitPoint) -> Tensor:
    if point.classes is None:
        raise ValueError("neg_normalized_entropy: expected the number of classes, got none")
    return -_stats(point).normalized_entropy(point.classes)


def _agreement(point: ExitPoint) -> Tensor:
    label = _stats(point).argmax
    assert point.earlier is not None  # `remembers` is set
    return ((label == point.earlier) & (label >= 0)).float()


def _logit_margin(point: ExitPoint) -> Tensor:
    return _stats(point).top1 - _stats(point).top2


def _entropy_unshifted(point: ExitPoint) -> Tensor:
    """DeeBERT's and BERxiT's formula as their code has it: ``log(sum e^z) - sum(z e^z) / sum(e^z)`` in float32.

    Beyond logits of 88 the sums overflow and the entropy is NaN: the most confident rows never leave.
    """
    stats = _stats(point)
    largest = stats.top1.float().exp()
    total, weighted = largest * stats.sumexp, largest * (stats.weighted + stats.top1 * stats.sumexp)
    return weighted / total - total.log()


#: Every measure by name. ``max_prob`` (Shallow-Deep Networks, RightTool, EE-LLM), ``margin`` (CALM's softmax response,
#: FREE), ``logit_margin`` (the same before the softmax, which does not saturate), ``neg_entropy`` (DeeBERT, in nats,
#: negated), ``neg_normalized_entropy`` (FastBERT: divided by log C), ``saturation`` (CALM: cosine of a layer's output
#: and input, no head read), ``probe`` (CALM's classifier, BERxiT's learning to exit: a learned map of the exit state,
#: no head read), ``agreement`` (1 where the exit before predicts the same, else 0; 0 at the first; exits that
#: the policy does not look at, before ``min_exit`` or between those of an ``interval``, are no exits before),
#: ``candidate_probe`` (SpecEE: a learned map of the logits of a few candidates, the only words read).
MEASURES: dict[str, Confidence] = {
    m.name: m
    for m in (
        Confidence("max_prob", 0.0, 1.0, True, lambda p: _stats(p).max_prob),
        Confidence("margin", 0.0, 1.0, True, lambda p: _stats(p).margin),
        Confidence("logit_margin", 0.0, float("inf"), True, _logit_margin),
        Confidence("neg_entropy", float("-inf"), 0.0, True, lambda p: -_stats(p).entropy),
        Confidence("neg_normalized_entropy", -1.0, 0.0, True, _normalized_entropy),
        Confidence("saturation", -1.0, 1.0, False, _saturation),
        Confidence("probe", 0.0, 1.0, False, _probe),
        Confidence("agreement", 0.0, 1.0, True, _agreement, remembers=True),
        candidate_probe(),
    )
}

#: The entropy of the published code of DeeBERT and BERxiT, for ``as_code=True`` alone: NaN beyond logits of 88.
UNSHIFTED_ENTROPY = Confidence("neg_entropy as code", float("-inf"), 0.0, True, _entropy_unshifted)


def max_prob_at(temperatures: Sequence[float]) -> Confidence:
    """Largest probability of ``softmax(logits / T)``, with a temperature for each exit (RightTool).

    Parameters
    ----------
    temperatures : sequence of float
        One an exit, larger than 0; from :func:`exeunt.calibration.temperatures`.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.confidence import ExitPoint, max_prob_at
    >>> logits = torch.tensor([[3.0, 0.0]])
    >>> stats, state = exeunt.ExitStats.from_logits(logits), torch.zeros(1, 8)
    >>> point = ExitPoint(state, state, exeunt.heads.ExitHead(), stats, classes=2, logits=logits)
    >>> max_prob_at([1.0]).score(point), max_prob_at([3.0]).score(point)
    (tensor([0.9526]), tensor([0.7311]))
    """
    by_exit = tuple(float(t) for t in temperatures)
    wrong = [t for t in by_exit if not (math.isfinite(t) and t > 0)]
    if wrong or not by_exit:
        raise ValueError(f"temperatures must be finite and larger than 0, one an exit, got {list(by_exit)}")

    def score(point: ExitPoint) -> Tensor:
        if point.logits is None:
            raise ValueError("max_prob at a temperature: expected the logits of all classes, got none")
        if point.exit >= len(by_exit):
            raise ValueError(f"temperatures must be one for each exit, got {len(by_exit)}")
        return ExitStats.from_logits(point.logits.float() / by_exit[point.exit]).max_prob

    # The name tells them apart, in sentences and for a calibration.
    name = f"max_prob at {', '.join(map(str, by_exit))}"
    return Confidence(name, 0.0, 1.0, True, score, remembers=True)


def measure(which: str | Confidence) -> Confidence:
    """Return the measure of that name, or the measure itself.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.confidence.measure("saturation").reads_head
    False
    """
    if isinstance(which, Confidence):
        return which
    if which not in MEASURES:
        raise ValueError(f"confidence must be one of {', '.join(MEASURES)}, got {which!r}")
    return MEASURES[which]
