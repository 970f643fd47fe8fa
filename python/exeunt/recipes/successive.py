"""Exit rules that were published for classifiers and look at several exits: patience, votes, windows, sums.

Rules on the confidence of one exit are in :mod:`exeunt.recipes.classifiers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from exeunt.confidence import Confidence
from exeunt.heads import ExitHeads
from exeunt.policies import Accumulate, FirstOf, Halting, Patience, Threshold, Vote, Window
from exeunt.recipes.classifiers import Thresholds, _classifier, _negated, _threshold, deebert
from exeunt.recipes.recipe import Recipe

__all__ = ["act", "beem", "elbert", "ensemble", "leebert", "pabee"]


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
        As for :func:`exeunt.recipes.shallow_deep`.

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
        As for :func:`exeunt.recipes.shallow_deep`.

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
        As for :func:`exeunt.recipes.shallow_deep`.

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
        As for :func:`exeunt.recipes.shallow_deep`.

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
        As for :func:`exeunt.recipes.shallow_deep`.

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
        As for :func:`exeunt.recipes.shallow_deep`.

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
