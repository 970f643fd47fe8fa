"""Exit rules that were published for taggers: words of a sequence halt on their own, or the sentence leaves whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from exeunt.confidence import measure
from exeunt.heads import ExitHeads
from exeunt.policies import Sentence, WordPolicy, WordWindow
from exeunt.recipes.classifiers import Thresholds, _negated, _threshold
from exeunt.recipes.recipe import Recipe
from exeunt.states import Freeze
from exeunt.words import Pieces

__all__ = ["sentee", "tokee"]

Doubt = Literal["entropy", "max_prob"]


def _bound(threshold: Thresholds, doubt: Doubt) -> float | tuple[float, ...]:
    if doubt not in ("entropy", "max_prob"):
        raise ValueError(f"doubt must be 'entropy' or 'max_prob', got {doubt!r}")
    return _negated("threshold", threshold) if doubt == "entropy" else _threshold(threshold)


def _tagger(
    policy: WordPolicy, doubt: Doubt, norm: Literal["post", "pre"], exits: Iterable[int] | None, heads: ExitHeads | None
) -> Recipe:
    if exits is None and heads is not None:
        exits = heads
    layers = None if exits is None else tuple(sorted(exits))
    name = "neg_normalized_entropy" if doubt == "entropy" else "max_prob"
    return Recipe(layers, measure(name), policy, Freeze(norm), heads)


def tokee(
    threshold: Thresholds = 0.15,
    *,
    window: int = 5,
    own: float | None = None,
    doubt: Doubt = "entropy",
    halted: Literal["recomputed", "certain"] = "recomputed",
    pieces: Pieces = "all",
    norm: Literal["post", "pre"] = "post",
    transitions: Tensor | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """TOKEE (Li et al., ACL 2021).

    A word halts at the first exit where the entropy of every word in a window around it, divided by log C, is below the
    threshold; its frozen state stays visible to the words that go on. A text ends once all of its words have halted.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.15
        The paper's delta, within 0..1; several: one an exit. With ``doubt="max_prob"`` the least largest probability.
    window : int, default 5
        Full width in words, odd. Reaches neither over the end of a text nor over a special token.
    own : float, optional
        A word whose own doubt is below this halts whatever its neighbours say.
    doubt : {"entropy", "max_prob"}
        What is measured.
    halted : {"recomputed", "certain"}
        How halted words count in a window: by what the exit says of their frozen state, or as certain.
    pieces : {"all", "first"}
        Which pieces of a word stop with it. The first one is what exits judge.
    norm : {"post", "pre"}
        Freeze the layer's output, or what its last norm reads, to which later layers apply theirs.
    transitions : Tensor, optional
        [C, C] bool, whether label b may follow label a; what a halted neighbour rules out is not said.
    exits, heads : optional
        As for :func:`shallow_deep`; heads read one state: linear or pooled.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** window 15 with threshold 0.10 for twice the speed, 5 with 0.15 for three and 5 with 0.25 for four
    times (OntoNotes 4); the script has ``norm="pre"``.
    **Deviations.** The released code means halted words to count as certain, but writes that into a buffer that is not
    read; here that is ``halted="certain"``. It runs one sentence at a time. Its FLOPs count attention at a twelfth.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.tokee(0.1, window=15).policy
    WordWindow(value=-0.1, pieces='all', window=15, own=None, halted='recomputed')
    """
    own = None if own is None else (-own if doubt == "entropy" else own)
    policy = WordWindow(_bound(threshold, doubt), pieces, transitions, window=window, own=own, halted=halted)
    return _tagger(policy, doubt, norm, exits, heads)


def sentee(
    threshold: Thresholds = 0.15,
    *,
    over: Literal["max", "mean"] = "max",
    doubt: Doubt = "entropy",
    transitions: Tensor | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """SENTEE (Li et al., ACL 2021).

    A text leaves whole at the first exit where the largest entropy of its words, divided by log C, is below the
    threshold.

    Parameters
    ----------
    threshold : float or sequence of float, default 0.15
        Within 0..1; several: one an exit. With ``doubt="max_prob"`` the least largest probability.
    over : {"max", "mean"}
        The largest doubt of the words, or its mean.
    doubt : {"entropy", "max_prob"}
        What is measured.
    transitions, exits, heads : optional
        As for :func:`tokee`.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** The maximum; thresholds are swept.
    **Deviations.** None in the rule; texts of a batch leave on their own.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.sentee(0.2, over="mean").policy
    Sentence(value=-0.2, pieces='all', over='mean')
    """
    return _tagger(Sentence(_bound(threshold, doubt), "all", transitions, over=over), doubt, "post", exits, heads)
