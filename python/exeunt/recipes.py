"""Recipes: one function per published system, a composition of the four concepts and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exeunt.confidence import Confidence, measure
from exeunt.heads import ExitHead, ExitHeads
from exeunt.policies import Decay, Threshold
from exeunt.states import Propagate

__all__ = ["Recipe", "calm"]


@dataclass(frozen=True)
class Recipe:
    """confidence x policy x state strategy x exit heads, at chosen layers.

    Attributes
    ----------
    exits : tuple of int
        Layers after which a token may leave, 0-based: 0 is after the first layer.
    confidence : Confidence
        What is measured there.
    policy : Threshold
        What is decided from it.
    state : Propagate
        What the skipped layers remember.
    heads : ExitHeads or None
        Exit heads by layer; an exit without one uses the model's own norm and head.
    """

    exits: tuple[int, ...]
    confidence: Confidence
    policy: Threshold
    state: Propagate
    heads: ExitHeads | None = None

    def __post_init__(self) -> None:
        if not self.exits:
            raise ValueError("exits must name at least one layer, got none")
        if any(isinstance(e, bool) or not isinstance(e, int) for e in self.exits):
            raise TypeError(f"exits must be layer indices (int), got {list(self.exits)}")
        if list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"exits must ascend without repeats, got {list(self.exits)}")
        self.policy.check(self.confidence.low, self.confidence.high, self.confidence.name)
        if self.confidence.name == "probe":
            bare = [e for e in self.exits if self.head(e).probe is None]
            if bare:
                raise ValueError(f"confidence 'probe' needs exit heads with a probe at exits {bare}, got none there")

    def head(self, layer: int) -> ExitHead:
        """What the exit after ``layer`` has of its own; an empty head where nothing was trained for it."""
        return self.heads[layer] if self.heads is not None and layer in self.heads else ExitHead()


def calm(
    exits: Iterable[int] | None = None,
    threshold: float = 0.9,
    *,
    confidence: str | Confidence = "margin",
    decay: float | None = None,
    length: int | None = None,
    heads: ExitHeads | None = None,
    lazy: bool = False,
) -> Recipe:
    """Confident Adaptive Language Modeling (Schuster et al., NeurIPS 2022).

    A token leaves at the first exit whose confidence reaches the threshold; skipped layers get keys and values from
    its exit state.

    Parameters
    ----------
    exits : iterable of int, optional
        Layers after which a token may leave, 0-based; by default those of ``heads``.
    threshold : float, default 0.9
        In the range of the measure; ``math.inf`` never exits.
    confidence : str or Confidence, default "margin"
        ``margin`` is the paper's softmax response, ``saturation`` its hidden-state saturation, ``probe`` its early-exit
        classifier; ``max_prob`` and ``neg_entropy`` work as well.
    decay : float, optional
        The paper's tau (4 there) of the decaying threshold; by default the threshold is constant.
    length : int, optional
        N of the decay; by default the most new tokens that ``generate`` allows.
    heads : ExitHeads, optional
        Trained exit heads.
    lazy : bool, default False
        Fill in skipped layers only when a later token attends there (:class:`exeunt.states.Propagate`).

    Returns
    -------
    Recipe

    Examples
    --------
    >>> import exeunt
    >>> recipe = exeunt.recipes.calm(exits=[8, 12, 16], threshold=0.9)
    >>> recipe.exits, recipe.confidence.name
    ((8, 12, 16), 'margin')
    """
    if exits is None:
        if heads is None:
            raise ValueError("calm: give exits, or heads that have them, got neither")
        exits = heads
    policy = Threshold(threshold, None if decay is None else Decay(decay, length))
    return Recipe(tuple(sorted(exits)), measure(confidence), policy, Propagate(lazy), heads)
