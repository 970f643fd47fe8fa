"""Exit rules that were published for language models: tokens leave, and skipped layers must remember them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch import Tensor

from exeunt.confidence import Confidence, candidate_probe, measure
from exeunt.heads import ExitHeads
from exeunt.policies import Adaptive, Decay, Falling, FixedDepth, Policy, Threshold
from exeunt.recipes.recipe import Recipe
from exeunt.states import Defer, Propagate, TokenState

__all__ = ["calm", "free", "skipdecode", "specee"]


def calm(
    exits: Iterable[int] | None = None,
    threshold: float = 0.9,
    *,
    confidence: str | Confidence = "margin",
    decay: float | None = None,
    length: int | None = None,
    heads: ExitHeads | None = None,
    lazy: bool = False,
    as_code: bool = False,
) -> Recipe:
    """CALM: Confident Adaptive Language Modeling (Schuster et al., NeurIPS 2022).

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
    as_code : bool, default False
        As in the released t5x code, where the decay never sees a position: the threshold stays constant.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** tau 4; thresholds from calibration; margin, saturation and a classifier compared.
    **Deviations.** Keys and values of skipped layers come from the state at the *exit* layer (the released code
    propagates that of the first exit segment); each row of a batch leaves on its own (there the least confident row
    decides for all); saturation is the cosine per row (there over the flattened batch) between a layer's output and
    its input, so that it is defined at every exit. The decaying threshold is ``clip(0.9 lambda + 0.1 exp(-tau t / N),
    0, 1)`` with t the new tokens so far, and off unless asked for; in the released code the position never arrives
    (``as_code=True``). Thresholds with a guarantee come from `calibration.learn_then_test`.

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
    if isinstance(exits, int):
        raise TypeError(f"calm: expected a list of exits, got {exits}")
    policy = Threshold(threshold, None if decay is None or as_code else Decay(decay, length))
    return Recipe(tuple(sorted(exits)), measure(confidence), policy, Propagate(lazy), heads)


def free(
    exit: int,
    threshold: float = 0.9,
    *,
    confidence: str | Confidence = "margin",
    adaptive: bool = False,
    heads: ExitHeads | None = None,
    state: TokenState | None = None,
    as_code: bool = False,
) -> Recipe:
    """FREE: Fast and Robust Early Exiting (Bae et al., EMNLP 2023).

    Two depths only: a token leaves at the shallow exit if its confidence exceeds the threshold. Tokens that left run
    through the deep layers together with the next one that stays (synchronised parallel decoding).

    Parameters
    ----------
    exit : int
        The layer after which a token may leave, 0-based.
    threshold : float, default 0.9
        lambda; with ``adaptive`` the one to begin with.
    confidence : str or Confidence, default "margin"
        ``probe`` is its other measure.
    adaptive : bool, default False
        Refit the threshold before each new sequence to what the deep layers said of tokens so far
        (:class:`exeunt.policies.Adaptive` with :func:`exeunt.calibration.beta_mixture`). It costs one more read of the
        head with every deep pass. The policy learns: one recipe for one task.
    heads : ExitHeads, optional
        Trained exit heads.
    state : Propagate, Defer, Recompute or Evict, optional
        What skipped layers remember; by default Defer, as published.
    as_code : bool, default False
        With ``adaptive``, the fit of the released code.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** Exit after 6 of 24 layers (8 of 24 for T5-3B); 0.9 at first, then refitted before each of the first
    300 sequences.
    **Deviations.** Rows of a batch decide for themselves, and each goes deep with as many waiting tokens as it has
    (there: batch 1). At most 32 tokens of a row wait (there: without bound). The fit is a real
    expectation-maximisation, and where no threshold is found no token leaves, so that the next sequence brings new
    evidence; the released code falls back to 0.9, where it stays (``as_code=True``). Its margin is read with one
    synchronisation a token. The rollback of tokens that the deep layers contradict is not part of it.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.free(5).policy
    Threshold(value=0.9, decay=None, strict=True, ...)
    >>> exeunt.recipes.free(5, adaptive=True).policy.threshold
    0.9
    """
    policy: Policy = Threshold(threshold, strict=True)
    if adaptive:
        from exeunt.calibration.beta_mixture import beta_mixture  # here, since calibration builds on recipes

        policy = Adaptive(functools.partial(beta_mixture, as_code=as_code), threshold)
    return Recipe((exit,), measure(confidence), policy, state or Defer(), heads)


def specee(
    exits: Iterable[int] | None = None,
    threshold: float = 0.5,
    *,
    count: int = 4,
    draft: Callable[[Tensor], Tensor] | None = None,
    heads: ExitHeads | None = None,
    lazy: bool = False,
    state: TokenState | None = None,
) -> Recipe:
    """SpecEE (Xu et al., ISCA 2025).

    A token leaves at the first exit at which a probe, reading the logits of a few candidates, says that the answer is
    there, and the whole head then says one of them.

    Parameters
    ----------
    exits : iterable of int, optional
        Layers after which a token may leave, 0-based; by default those of ``heads``.
    threshold : float, default 0.5
        Of the probe.
    count : int, default 4
        Candidates, 2 to 8.
    draft : callable, optional
        Names them: from the states [n, D] after the first exit's layer to ids [n, count]. By default they are the
        words with the largest logits there.
    heads : ExitHeads
        With a :class:`exeunt.heads.CandidateProbe` at every exit (:func:`exeunt.training.train_candidate_probes`).
    lazy : bool, default False
        As in :func:`calm`.
    state : TokenState, optional
        What skipped layers remember instead: ``states.Evict()`` as the published code has it.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** 0.5; layers 15, 16, 17, 19, 21, 24, 26 and 28 of Llama-2-7B and those near the last five exits; the
    predictor has one hidden layer of 512.
    **Deviations.** The candidates come from the first exit, by one read of the head, where the paper has EAGLE's draft
    model (a ``draft`` of yours takes its place). All exits are looked at: those near the last ones of a generation are
    not chosen as it runs. Skipped layers get keys and values unless ``state`` says otherwise; there they miss the
    token, so that layers differ in length.

    Examples
    --------
    >>> import exeunt
    >>> from exeunt.heads import CandidateProbe, ExitHead, ExitHeads
    >>> recipe = exeunt.recipes.specee(heads=ExitHeads({e: ExitHead(candidates=CandidateProbe()) for e in (4, 7)}))
    >>> recipe.measures, recipe.policy.value, recipe.candidates.count
    ('candidate_probe', 0.5, 4)
    """
    exits = heads if exits is None else exits
    if exits is None:
        raise ValueError("specee: give exits, or heads that have them, got neither")
    policy = Threshold(threshold, strict=True)
    return Recipe(tuple(sorted(exits)), candidate_probe(count, draft), policy, state or Propagate(lazy), heads)


def skipdecode(
    deepest: int,
    shallowest: int,
    *,
    length: int | None = None,
    exits: Iterable[int] | None = None,
    heads: ExitHeads | None = None,
) -> Recipe:
    """SkipDecode (Del Corro et al. 2023).

    The depth of a token depends on its position alone, is the same for a whole batch, and never grows.

    Parameters
    ----------
    deepest, shallowest : int
        0-based layers after which the first and the last new token leave.
    length : int, optional
        New tokens over which the depth falls; by default the most that ``generate`` allows.
    exits : iterable of int, optional
        Layers after which tokens may leave; by default all from ``shallowest`` to ``deepest``.
    heads : ExitHeads, optional
        Trained exit heads.

    Returns
    -------
    Recipe

    Notes
    -----
    **Published.** A linear fall between two depths; no code was released.
    **Deviations.** It skips layers in the lower half and runs the upper ones; here the layers after the exit are
    skipped, as in all recipes. No later token needs what a skipped layer missed, so lazy propagation fills in next to
    nothing.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.skipdecode(20, 10).exits
    (10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
    """
    policy = FixedDepth(Falling(deepest, shallowest, length))
    layers = tuple(range(shallowest, deepest + 1)) if exits is None else tuple(sorted(exits))
    return Recipe(layers, None, policy, Propagate(lazy=True), heads)
