"""Every recipe over its range of thresholds, on one recording: the curves that a report draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from exeunt import recipes
from exeunt.confidence import measure
from exeunt.policies import FixedDepth, Oracle, Policy, Threshold
from exeunt.recipes import Recipe
from exeunt.replay import Recording, Replay, replay
from exeunt.states import Drop, Propagate

__all__ = ["baselines", "families", "frontier", "sweep"]

Family = Callable[[float], Recipe]


def sweep(
    recording: Recording, points: int = 50, *, only: Callable[[str], bool] | None = None
) -> dict[str, list[Replay]]:
    """Replay every recipe that the recording has what it takes for, over its thresholds.

    Parameters
    ----------
    recording : Recording
        Of classifiers or of tokens.
    points : int, default 50
        Operating points of a recipe; fewer where its parameter is a whole number.
    only : callable, optional
        Which recipes, by name.

    Returns
    -------
    dict of str to list of Replay
        By recipe, from the least layers to the most.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import sweep
    >>> from exeunt.replay import Recording
    >>> curves = sweep(Recording.of_logits(torch.randn(200, 6, 3).cumsum(1)), points=5)
    >>> len(curves["fastbert"]), curves["fastbert"][0].mean_layers < curves["fastbert"][-1].mean_layers
    (5, True)
    """
    curves = {}
    for name, family in families(recording).items():
        if only is not None and not only(name):
            continue
        found: dict[Any, Recipe] = {}
        for k in range(points):
            recipe = family((k + 0.5) / points)
            found.setdefault((recipe.exits, recipe.policy), recipe)
        curves[name] = sorted((replay(recording, r) for r in found.values()), key=lambda r: r.mean_layers)
    return curves


def families(recording: Recording) -> dict[str, Family]:
    """For each recipe that applies, a function of how strict it is to be, from 0 to 1, that makes it.

    Thresholds are quantiles of the recorded scores, so that they lie where the scores do.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation.sweep import families
    >>> from exeunt.replay import Recording
    >>> make = families(Recording.of_logits(torch.randn(200, 6, 3)))["shallow_deep"]
    >>> make(0.2).policy.value < make(0.8).policy.value
    True
    """
    return dict(_tokens(recording) if recording.positions is not None else _rows(recording))


def _rows(recording: Recording) -> Iterator[tuple[str, Family]]:
    exits = len(recording.exits)
    levels, largest = _levels(recording, "max_prob"), exits**0.5
    yield "shallow_deep", lambda u: recipes.shallow_deep(levels(u))
    yield "right_tool", lambda u: recipes.right_tool(levels(u))
    yield "beem", lambda u: recipes.beem(max(u * exits, 1e-6))
    if recording.costs is not None:
        yield "cascadebert", lambda u: recipes.cascadebert(levels(u))
    entropies = _levels(recording, "neg_entropy")
    yield "deebert", lambda u: recipes.deebert(-entropies(u))
    yield "gpf", lambda u: recipes.gpf(-entropies(u))
    normalized = _levels(recording, "neg_normalized_entropy")
    yield "fastbert", lambda u: recipes.fastbert(-normalized(u))
    if exits > 1:
        yield "elbert", lambda u: recipes.elbert(-normalized(u), min(4, exits))
        yield "pabee", lambda u: recipes.pabee(1 + int(u * (exits - 1)))
        yield "leebert", lambda u: recipes.leebert(1 + int(u * (exits - 1)))
        yield "ensemble", lambda u: recipes.ensemble(1 + u * (largest - 1))
    margins = _levels(recording, "margin")
    yield "calm", lambda u: recipes.calm(recording.exits, margins(u))
    middle = recording.exits[exits // 2]
    yield "free", lambda u: recipes.free(middle, margins(u))
    if "probe" in recording.measures:
        probes = _levels(recording, "probe")
        yield "berxit", lambda u: recipes.berxit(1 - probes(u))
        yield "cats", lambda u: recipes.cats(probes(u))
    if recording.logits is not None:
        halting = "probe" if "probe" in recording.measures else "max_prob"
        yield "act", lambda u: recipes.act(max(1 - u, 1e-6), confidence=halting)


def _tokens(recording: Recording) -> Iterator[tuple[str, Family]]:
    exits = recording.exits
    margins = _levels(recording, "margin")
    yield "calm", lambda u: recipes.calm(exits, margins(u))
    middle = exits[len(exits) // 2]
    yield "free", lambda u: recipes.free(middle, margins(u))
    if "saturation" in recording.measures:
        cosines = _levels(recording, "saturation")
        yield "calm, saturation", lambda u: recipes.calm(exits, cosines(u), confidence="saturation")
    if "probe" in recording.measures:  # recipes made by hand: their scores are on record, no heads are needed
        probes, probe = _levels(recording, "probe"), measure("probe")
        yield "calm, probe", lambda u: Recipe(None, probe, Threshold(probes(u)), Propagate())
    if "candidate_probe" in recording.measures:
        words, candidates = _levels(recording, "candidate_probe"), measure("candidate_probe")
        yield "specee", lambda u: Recipe(None, candidates, Threshold(words(u), strict=True), Propagate())
    length = int(recording.positions.max()) + 1 if recording.positions is not None else 1
    yield "skipdecode", lambda u: recipes.skipdecode(exits[-1], exits[int(u * len(exits))], length=length, exits=exits)


def _levels(recording: Recording, name: str) -> Callable[[float], float]:
    """Quantiles of a measure's scores over rows and exits, within its range."""
    columns = tuple(range(len(recording.exits) + 1))
    scores = recording.scores(measure(name), columns)[:-1].flatten()
    ordered = scores[scores.isfinite()].sort().values
    if not len(ordered):
        raise ValueError(f"{name}: expected scores that are finite, got none")
    return lambda u: float(ordered[int(u * len(ordered))])


def baselines(recording: Recording) -> dict[str, list[Replay]]:
    """What every rule is to be compared with: fixed depths, and the oracles that bound what can be gained.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import baselines
    >>> from exeunt.replay import Recording
    >>> known = baselines(Recording.of_logits(torch.randn(50, 4, 3)))
    >>> [r.mean_layers for r in known["fixed depth"]], known["oracle, as full depth"][0].consistency
    ([1.0, 2.0, 3.0], 1.0)
    """
    bounds: dict[str, list[Policy]] = {
        "fixed depth": [FixedDepth(e) for e in recording.exits],
        "oracle, as full depth": [Oracle()],
        "oracle, right": [Oracle("label")] if recording.labels is not None else [],
    }
    return {
        name: [replay(recording, Recipe(recording.exits, None, policy, Drop())) for policy in policies]
        for name, policies in bounds.items()
        if policies
    }


def frontier(replays: list[Replay], quality: Callable[[Replay], float]) -> list[Replay]:
    """Those that no other beats in both layers and quality, from the fewest layers on.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import frontier, sweep
    >>> from exeunt.replay import Recording
    >>> curve = sweep(Recording.of_logits(torch.randn(200, 6, 3).cumsum(1)), points=9)["deebert"]
    >>> best = frontier(curve, lambda r: r.consistency)
    >>> 0 < len(best) <= len(curve)
    True
    """
    best: list[Replay] = []
    for r in sorted(replays, key=lambda r: (r.mean_layers, -quality(r))):
        if not best or quality(r) > quality(best[-1]):
            best.append(r)
    return best
