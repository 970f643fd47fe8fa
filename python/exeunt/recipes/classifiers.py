"""Exit rules that were published for classifiers on encoders and look at one exit; most work wherever labels are few.

Rows of an encoder leave whole: the layers that they skip never see them again (``states.Drop``). Rules on several exits
are in :mod:`exeunt.recipes.successive`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from exeunt.confidence import UNSHIFTED_ENTROPY, Confidence, max_prob_at, measure
from exeunt.heads import ExitHeads
from exeunt.policies import Policy, Threshold
from exeunt.recipes.recipe import Recipe
from exeunt.states import Drop

__all__ = ["berxit", "cascadebert", "cats", "deebert", "fastbert", "gpf", "right_tool", "shallow_deep"]

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
