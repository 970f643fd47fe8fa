"""Exit rules that were published for classifiers on encoders; most work wherever labels are few.

Rows of an encoder leave whole: the layers that they skip never see them again (``states.Drop``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from exeunt.confidence import UNSHIFTED_ENTROPY, Confidence, max_prob_at, measure
from exeunt.heads import ExitHeads
from exeunt.policies import Accumulate, FirstOf, Halting, Patience, Policy, Threshold, Vote, Window
from exeunt.recipes.recipe import Recipe
from exeunt.states import Drop

__all__ = [
    "act",
    "beem",
    "berxit",
    "cascadebert",
    "cats",
    "deebert",
    "elbert",
    "ensemble",
    "fastbert",
    "gpf",
    "leebert",
    "pabee",
    "right_tool",
    "shallow_deep",
]

Thresholds = float | Sequence[float]


def _classifier(
    confidence: str | Confidence | None, policy: Policy, exits: Iterable[int] | None, heads: ExitHeads | None
) -> Recipe:
    if exits is None and heads is not None:
        exits = heads
    layers = None if exits is None else tuple(sorted(exits))
    return Recipe(layers, None if confidence is None else measure(confidence), policy, Drop(), heads)


def _negated(name: str, bound: Thresholds) -> float | tuple[float, ...]:
    """Thresholds on a negated uncertainty that the user gives as the papers do: larger than 0."""
    values = (bound,) if isinstance(bound, (int, float)) else tuple(bound)
    wrong = [v for v in values if not v >= 0]
    if wrong:
        raise ValueError(f"{name} must not be negative, got {wrong[0]}")
    return -bound if isinstance(bound, (int, float)) else tuple(-v for v in values)


def _threshold(value: Thresholds) -> float | tuple[float, ...]:
    return value if isinstance(value, (int, float)) else tuple(value)


def shallow_deep(
    threshold: Thresholds = 0.9, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None
) -> Recipe:
    """Shallow-Deep Networks (Kaya et al., ICML 2019).

    Leave at the first exit whose largest probability reaches the threshold; where none does, answer with the most
    confident of all exits and full depth.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.9
        The paper's q, within 0..1; several: one an exit.
    exits : iterable of int, optional
        Layers after which a row may leave, 0-based; by default those of ``heads``, or all but the last. So for all
        recipes of this module.
    heads : ExitHeads, optional
        Trained exit heads.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** q is swept; six exits at 15, 30, 45, 60, 75 and 90 % of the cost.
    **Deviations.** None in the rule. Its heads mix average and maximum pooling of image features.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.shallow_deep(0.8).policy.fallback
    'most_confident'
    """
    return _classifier("max_prob", Threshold(_threshold(threshold), fallback="most_confident"), exits, heads)


def act(
    eps: float = 0.01,
    *,
    confidence: str | Confidence = "probe",
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """Adaptive Computation Time (Graves 2016), read over layers.

    Leave at the first exit at which the halting scores sum to 1 - eps; answer with the mean of the logits so far,
    weighted by the scores, the last by what is left of 1.

    Parameters
    ----------
    eps : float, default 0.01
        Lets the first exit suffice.
    confidence : str or Confidence, default "probe"
        The halting unit, within 0..1: a probe is the paper's sigmoid of a linear map.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** eps 0.01; at most 100 steps.
    **Deviations.** A step is a layer of a transformer instead of a step of a recurrent cell. The outputs are averaged,
    the states are not: a row that has halted is gone. A halting score that is not finite counts as 0.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.act().policy
    Halting(eps=0.01)
    """
    return _classifier(confidence, Halting(eps), exits, heads)


def deebert(
    entropy: Thresholds = 0.1,
    *,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
    as_code: bool = False,
) -> Recipe:
    """DeeBERT (Xin et al., ACL 2020).

    Leave at the first exit whose entropy is below the threshold.

    Parameters
    ----------
    entropy : float or sequence of float, default 0.1
        The paper's S, in nats; several: one an exit. With 0 nothing leaves.
    exits, heads : optional
        As for :func:`shallow_deep`.
    as_code : bool, default False
        Entropy without subtraction of the maximum, as the released code has it.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** S is swept; the released default, -1, never exits.
    **Deviations.** The released formula overflows beyond logits of 88 (11 in float16): its entropy is NaN, and the most
    confident rows never leave. Here it is computed in shifted form; ``as_code=True`` follows the code. Rows of a batch
    leave on their own; the code works for single rows only.

    Examples
    --------
    >>> import exeunt
    >>> recipe = exeunt.recipes.deebert(0.2)
    >>> recipe.confidence.name, recipe.policy.value, recipe.policy.strict
    ('neg_entropy', -0.2, True)
    """
    confidence = UNSHIFTED_ENTROPY if as_code else measure("neg_entropy")
    return _classifier(confidence, Threshold(_negated("entropy", entropy), strict=True), exits, heads)


def right_tool(
    threshold: Thresholds = 0.9,
    *,
    temperatures: Sequence[float] | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """The Right Tool for the Job (Schwartz et al., ACL 2020).

    Leave at the first exit whose largest probability, at a temperature fitted for that exit, reaches the threshold.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.9
        Within 0..1.
    temperatures : sequence of float, optional
        One an exit and one for full depth if that is asked for too; from :func:`exeunt.calibration.temperatures`.
        By default 1.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** The threshold is swept; exits 0, 3, 5 and 11 of 12 layers, or 0, 4, 12 and 23 of 24.
    **Deviations.** None in the rule. Where a head reads the logits of earlier ones, those were divided by their
    temperatures: fit in order, as `calibration.temperatures` does. The code's optimiser never moves the weights that
    mix the layers, which belong to the heads.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.right_tool(0.95, temperatures=[1.5, 1.2], exits=[3, 5]).exits
    (3, 5)
    """
    confidence = measure("max_prob") if temperatures is None else max_prob_at(temperatures)
    return _classifier(confidence, Threshold(_threshold(threshold)), exits, heads)


def fastbert(speed: Thresholds = 0.5, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None) -> Recipe:
    """FastBERT (Liu et al., ACL 2020).

    Leave at the first exit whose entropy, divided by log C, is below the speed.

    Parameters
    ----------
    speed : float or sequence of float, default 0.5
        Within 0..1: with 0 nothing leaves, with 1 everything but a uniform distribution at the first exit.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** Speeds 0.1, 0.5 and 0.8.
    **Deviations.** None in the rule; each row leaves on its own. The code's mean pooling averages over the hidden
    dimension, and its distillation has the divergence the other way round than the paper: both belong to heads and
    training.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.fastbert(0.8).confidence.name
    'neg_normalized_entropy'
    """
    return _classifier("neg_normalized_entropy", Threshold(_negated("speed", speed), strict=True), exits, heads)


def cascadebert(
    threshold: Thresholds = 0.9, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None
) -> Recipe:
    """CascadeBERT (Li et al., Findings of EMNLP 2021).

    Stop at the first of several complete models, small to large, whose largest probability exceeds the threshold.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.9
        The paper's tau; several: one a model but the last.
    exits : iterable of int, optional
        Indices of the models but the last, from 0.
    heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** Models of 2 and 12 layers; thresholds 0.6, 0.7, 0.8 and 0.9 on MRPC.
    **Deviations.** An exit is a model of its own, which begins with the text: what a row runs through adds up (2 + 12
    layers), which a recording says by its ``costs``. For replay; nothing attaches it. The released code runs all
    models on all rows and counts what it would have saved.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.cascadebert(0.8, exits=[0]).exits
    (0,)
    """
    return _classifier("max_prob", Threshold(_threshold(threshold), strict=True), exits, heads)


def pabee(
    patience: int = 6,
    *,
    tolerance: float | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """PABEE, "BERT loses patience" (Zhou et al., NeurIPS 2020).

    Leave once so many exits in a row have predicted what the one before did.

    Parameters
    ----------
    patience : int, default 6
        The paper's t: t + 1 equal labels.
    tolerance : float, optional
        The paper's tau for regression: values agree if they differ by less.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** t = 6 on ALBERT-base.
    **Deviations.** Each row has a count of its own: in the released code a batch leaves when all of its rows agree, and
    its regression fails beyond one row. Patience 0, there a name for full depth, is refused.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.pabee(3).policy
    Patience(patience=3, tolerance=None)
    """
    return _classifier(None, Patience(patience, tolerance), exits, heads)


def elbert(
    entropy: float = 0.1,
    window: int = 4,
    *,
    kind: Literal["side", "monotone", "steady"] = "side",
    margin: float = 0.0,
    spread: float = 0.1,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """ELBERT (Xie et al., ICASSP 2021).

    Leave at the first exit whose entropy, divided by log C, is below a threshold, or at which the last few
    probabilities have settled.

    Parameters
    ----------
    entropy : float, default 0.1
        The paper's delta, within 0..1.
    window : int, default 4
        Exits in the window.
    kind : {"side", "monotone", "steady"}
        The paper's biases 1, 2 and 3 (:class:`exeunt.policies.Window`).
    margin, spread : float
        Of the window.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** delta 0.1 in its example; the window's size is a required option.
    **Deviations.** The window watches the probability of the class predicted now instead of class 0 of two, which says
    the same for two classes; a change of class empties it. Each row has an entropy and a window of its own: the code
    takes the mean entropy of the batch.

    Examples
    --------
    >>> import exeunt
    >>> [type(p).__name__ for p in exeunt.recipes.elbert(kind="monotone").policy.policies]
    ['Threshold', 'Window']
    """
    entropies = Threshold(_negated("entropy", entropy), strict=True)
    policy = FirstOf((entropies, Window(window, kind, margin, spread)))
    return _classifier("neg_normalized_entropy", policy, exits, heads)


def ensemble(
    share: float = 2.0,
    alpha: float = 0.5,
    *,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """Early Exiting with Ensemble Internal Classifiers (Sun et al. 2021).

    Leave once one class has enough of the votes of the exits so far, and answer with it.

    Parameters
    ----------
    share : float, default 2.0
        The paper's nu: votes of a class, divided by m^alpha after m exits.
    alpha : float, default 0.5
        0 counts votes, 1 takes their share.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** No code was released; the form of the vote follows secondary sources, the defaults are ours: four
    exits that agree.
    **Deviations.** Rows that no exit lets go answer with the votes too, that of full depth among them.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.ensemble(3, alpha=0.0).policy
    Vote(share=3, alpha=0.0)
    """
    return _classifier(None, Vote(share, alpha), exits, heads)


def leebert(
    patience: int = 6,
    *,
    entropy: float | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """LeeBERT (Zhu, ACL 2021).

    Leave by patience as PABEE, or by entropy; what is new are exits that were trained to learn from each other.

    Parameters
    ----------
    patience : int, default 6
        As in :func:`pabee`.
    entropy : float, optional
        Take this threshold in nats instead of patience.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** No code was released; compared at equal speed with PABEE.
    **Deviations.** None in the rule. Mutual distillation is an objective of training, not part of the recipe.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.leebert().policy == exeunt.recipes.pabee().policy
    True
    """
    if entropy is not None:
        return deebert(entropy, exits=exits, heads=heads)
    return pabee(patience, exits=exits, heads=heads)


def gpf(entropy: Thresholds = 0.1, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None) -> Recipe:
    """Global Past-Future early exit (Liao et al., NAACL 2021).

    Leave at the first exit whose entropy is below the threshold; the head reads all states so far and a guess of
    those to come.

    Parameters
    ----------
    entropy : float or sequence of float, default 0.1
        In nats; several: one an exit.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** The threshold is swept.
    **Deviations.** Rows of a batch leave on their own (there only if all may), and the entropy has no NaN. The head,
    which is what is new, has to come from outside: any that was trained so can be recorded and replayed.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.gpf(0.3).policy.value
    -0.3
    """
    return _classifier("neg_entropy", Threshold(_negated("entropy", entropy), strict=True), exits, heads)


def berxit(
    uncertainty: Thresholds = 0.005, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None
) -> Recipe:
    """BERxiT's learning to exit (Xin et al., EACL 2021).

    Leave at the first exit at which a probe, one for all layers, says that the prediction is not uncertain.

    Parameters
    ----------
    uncertainty : float or sequence of float, default 0.005
        Within 0..1; several: one an exit.
    exits, heads : optional
        As for :func:`shallow_deep`; with a probe at every exit.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** 0.005 at every layer.
    **Deviations.** The probe here says how certain it is: leave if it exceeds 1 - uncertainty. Its reading of the
    normalised exit state takes the place of the pooled one.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.berxit(0.25).policy.value
    0.75
    """
    if isinstance(uncertainty, (int, float)):
        return _classifier("probe", Threshold(1 - uncertainty, strict=True), exits, heads)
    return _classifier("probe", Threshold(tuple(1 - u for u in uncertainty), strict=True), exits, heads)


def cats(threshold: Thresholds = 0.95, *, exits: Iterable[int] | None = None, heads: ExitHeads | None = None) -> Recipe:
    """Confident Adaptive Transformers (Schuster et al., EMNLP 2021).

    Leave at the first exit at which a probe says that its prediction is that of full depth; the threshold is chosen so
    that this holds as often as promised.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.95
        From :func:`exeunt.calibration.conformal`; several: one an exit (its ``independent`` variant).
    exits, heads : optional
        As for :func:`shallow_deep`; with a probe at every exit.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** Thresholds come from calibration data alone.
    **Deviations.** The released code computes all layers and says afterwards where it would have left; here rows leave.
    Its probe also reads the predictions of earlier exits, which has to be recorded to be replayed. Thresholds are those
    of `calibration.conformal`, which count a tie as reached.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.cats([0.9, 0.8], exits=[3, 7], heads=exeunt.heads.ExitHeads({
    ...     e: exeunt.heads.ExitHead(probe=exeunt.heads.Probe(16)) for e in (3, 7)})).policy.value
    (0.9, 0.8)
    """
    return _classifier("probe", Threshold(_threshold(threshold)), exits, heads)


def beem(
    threshold: Thresholds = 2.0,
    *,
    weights: Sequence[float] | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """BEEM: exits as experts (Bajpai and Hanawal, ICLR 2025).

    Add up weighted confidence while successive exits agree; leave once the sum reaches the threshold.

    Parameters
    ----------
    threshold : float or sequence of float, default 2.0
        The paper's alpha; several: one an exit, from :func:`exeunt.calibration.error_rates`.
    weights : sequence of float, optional
        One an exit: its cost, or its accuracy on held-out data. By default 1.
    exits, heads : optional
        As for :func:`shallow_deep`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** Weights by cost or by accuracy; the threshold is found by search on error rates of the exits.
    **Deviations.** `calibration.error_rates` is our reading of that search: for each exit the lowest threshold at which
    those that leave there are wrong no more often than a level, for instance as full depth is. Its code was not read.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.beem(1.5).policy
    Accumulate(threshold=1.5, weights=None)
    """
    return _classifier("max_prob", Accumulate(_threshold(threshold), weights), exits, heads)
