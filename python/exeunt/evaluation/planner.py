"""Planner: from a recording and what things cost on this machine to a recipe, or to the advice not to bother.

What early exit gains is decided by few numbers, all measured on live runs of the model at hand: the time of a stock
step, what a skipped layer saves (its own time minus that of its keys and values), what a check costs, and what it costs
that rows leave. :func:`measure_costs` takes them, :meth:`Costs.ratio` turns a replay into an expected ratio of times,
and :func:`plan` looks for the recipe with the best one at the quality that was asked for.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.attach import attach
from exeunt.confidence import candidate_probe, measure
from exeunt.evaluation.sweep import sweep
from exeunt.heads import ExitHeads
from exeunt.policies import At, Evidence, Oracle, Policy, State, Threshold
from exeunt.recipes import Recipe
from exeunt.replay import Recording, Replay, replay
from exeunt.states import Drop

__all__ = ["Costs", "Plan", "measure_costs", "plan"]

NOISE = 0.03  # gains below that are none


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of one step (a forward of an encoder, a decoding step) for a batch.

    Attributes
    ----------
    batch : int
        Rows of a step.
    layers : int
        Of the model.
    stock : float
        A step of the model without exits.
    layer : float
        What skipping a layer saves if no row runs it: the layer, minus keys and values for the rows that skip it.
    check : float
        One exit check of all rows.
    leave : float
        Once for each exit at which rows leave; less than 0 where leaving saves a read of the head.
    fixed : float, default 1.0
        Share of a layer's and a check's time that is the same for one row as for all: 1 where reading weights decides.
    half : float, optional
        Share of a layer's time that half of the rows take: less than a half where rows that stay are also cut to their
        own length. By default what ``fixed`` says.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import Costs
    >>> costs = Costs(batch=1, layers=4, stock=5.0, layer=1.0, check=0.5, leave=0.0)
    >>> costs.seconds(torch.tensor([1, 3]), exits=[1])     # two steps: one leaves after layer 1, one runs through
    4.5
    """

    batch: int
    layers: int
    stock: float
    layer: float
    check: float
    leave: float
    fixed: float = 1.0
    half: float | None = None

    def work(self, share: Tensor) -> Tensor:
        """Share of a layer's time that a share of the rows takes: straight lines between what was measured."""
        half = (1 + self.fixed) / 2 if self.half is None else self.half
        fixed = min(self.fixed, half)
        lower, upper = fixed + (half - fixed) * 2 * share, half + (1 - half) * (2 * share - 1)
        return torch.where(share > 0, torch.where(share < 0.5, lower, upper), 0.0)

    def seconds(self, depth: Tensor, exits: Iterable[int], seed: int = 0) -> float:
        """Expected seconds of a step.

        Parameters
        ----------
        depth : Tensor
            [n] layers after which rows leave, which are put into batches at random.
        exits : iterable of int
            Layers after which there is a check.
        """
        order = torch.randperm(len(depth), generator=torch.Generator().manual_seed(seed))
        batch = min(self.batch, len(depth))
        steps = depth[order][: len(depth) // batch * batch].view(-1, batch)
        running = torch.stack([(steps >= layer).sum(1) for layer in range(self.layers)], 1)  # [steps, L]
        work = self.work(running / batch)
        checked = [e for e in exits if e < self.layers - 1]
        left = sum(((steps == e).any(1).double() for e in checked), torch.zeros(len(steps), dtype=torch.float64))
        seconds = self.stock - self.layer * (self.layers - work.sum(1))
        seconds = seconds + self.check * work[:, checked].sum(1) + self.leave * left
        return float(seconds.mean())

    def ratio(self, replayed: Replay) -> float:
        """Expected speed-up: stock time over time with exits."""
        exits = replayed.recipe.exits or replayed.recording.exits
        return self.stock / self.seconds(replayed.depth, exits)

    def bound(self, replayed: Replay) -> float:
        """The same if nobody had to check: for oracles, which know."""
        free = dataclasses.replace(self, check=0.0, leave=min(self.leave, 0.0))
        return self.stock / free.seconds(replayed.depth, replayed.recipe.exits or replayed.recording.exits)

    @property
    def check_in_layers(self) -> float:
        """Layers that a check costs."""
        return self.check / self.layer if self.layer > 0 else math.inf


def measure_costs(
    model: object, recipe: Recipe, step: Callable[[int], float], *, batch: int, layers: int, repeats: int = 5
) -> Costs:
    """Take a model's costs on this machine, from live runs.

    With a single exit, what leaving costs or saves beside the layers (compaction, a read of the head) can't be told
    from them: it is then part of ``layer``, in whose unit advice speaks of checks. Expected ratios don't depend on it.

    Parameters
    ----------
    model : nn.Module
        Nothing may be attached to it.
    recipe : Recipe
        Whose measure, exits, state strategy and heads are used; its policy is replaced by thresholds that nothing
        reaches and that everything does.
    step : callable
        ``step(rows)`` runs the model on that many rows and returns seconds for one step; of the processor
        (``time.process_time`` on one thread) where other work shares the machine.
    batch : int
        Rows of a step.
    layers : int
        Of the model.
    repeats : int, default 5
        The kinds of runs take turns so often; medians count.

    Returns
    -------
    Costs

    Raises
    ------
    ValueError
        If the recipe has no measure or names no exits.

    Examples
    --------
    >>> import time, torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.evaluation import measure_costs
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, eos_token_id=None,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> def step(rows):
    ...     since = time.perf_counter()
    ...     model.generate(torch.full((rows, 3), 5), max_new_tokens=4, do_sample=False)
    ...     return (time.perf_counter() - since) / 4
    >>> measure_costs(model, exeunt.recipes.calm([1]), step, batch=1, layers=4, repeats=1).stock > 0
    True
    """
    scored, exits = recipe.confidence, recipe.exits
    if scored is None or not exits:
        raise ValueError("measure_costs: expected a recipe with a confidence measure and exits")
    never = dataclasses.replace(recipe, policy=Threshold(math.inf))
    always = {e: dataclasses.replace(recipe, exits=(e,), policy=Threshold(scored.low)) for e in (exits[0], exits[-1])}
    times: dict[object, list[float]] = {}

    def timed(name: object, rows: int, attached: Recipe | None) -> None:
        if attached is None:
            times.setdefault(name, []).append(step(rows))
            return
        with attach(model, attached):
            times.setdefault(name, []).append(step(rows))

    for _ in range(repeats + 1):
        timed("stock", batch, None)
        if batch > 1:
            timed("one", 1, None)
        timed("never", batch, never)
        for e, all_leave in always.items():
            timed(e, batch, all_leave)
        if batch > 1:
            timed("half", batch, dataclasses.replace(recipe, exits=exits[:1], policy=_Half()))
    runs = {name: values[1:] for name, values in times.items()}  # the first warms up
    stock = statistics.median(runs["stock"])
    # Differences within a turn: what disturbs a machine for a while is in both.
    beside = {n: [b - a for a, b in zip(runs["stock"], v, strict=True)] for n, v in runs.items()}
    took = {name: stock + statistics.median(differences) for name, differences in beside.items()}
    check = max((took["never"] - stock) / len(exits), 0.0)
    first, last = exits[0], exits[-1]
    if first != last:
        layer = (took[last] - took[first]) / (last - first)
    else:
        layer = (stock + check - took[first]) / (layers - 1 - first)
    leave = took[first] - check - (stock - layer * (layers - 1 - first))
    fixed, half = 1.0, None
    if batch > 1:
        slope = (stock - took["one"]) / (batch - 1)
        fixed = min(max((took["one"] - slope) / stock, 0.0), 1.0)
        saved = stock + check + leave - took["half"]
        half = min(max(1 - saved / (layer * (layers - 1 - first)), 0.1), 1.0) if layer > 0 else None
    return Costs(batch, layers, stock, layer, check, leave, fixed, half)


@dataclass(frozen=True)
class _Half(Policy):
    """Every second row leaves."""

    def step(self, state: State, seen: Evidence, at: At) -> Tensor:
        assert seen.score is not None
        return torch.arange(len(seen.score), device=seen.score.device) % 2 == 0


@dataclass(frozen=True)
class Plan:
    """What the planner advises.

    Attributes
    ----------
    recipe : Recipe or None
        None: stay with the stock model.
    replayed : Replay
        The best that was found, on the half of the rows that did not choose it.
    ratio : float
        Its expected speed-up on the clock.
    oracle : float
        That of a rule which leaves at the first exit that agrees with full depth, and checks for nothing.
    sentences : tuple of str
        What follows, in words.

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import Costs, plan
    >>> from exeunt.replay import Recording
    >>> g = torch.Generator().manual_seed(0)
    >>> recording = Recording.of_logits(4 * torch.randn(600, 1, 3, generator=g) + torch.randn(600, 6, 3, generator=g))
    >>> cheap = Costs(batch=1, layers=6, stock=7.0, layer=1.0, check=0.1, leave=0.0)
    >>> advice = plan(recording, cheap, consistency=0.9, points=5, only=lambda name: name == "shallow_deep")
    >>> advice.recipe.confidence.name, 1 < advice.ratio < advice.oracle, advice.replayed.consistency > 0.85
    ('max_prob', True, True)
    """

    recipe: Recipe | None
    replayed: Replay
    ratio: float
    oracle: float
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def plan(
    recording: Recording,
    costs: Costs,
    *,
    consistency: float = 0.95,
    heads: ExitHeads | None = None,
    points: int = 20,
    only: Callable[[str], bool] | None = None,
) -> Plan:
    """Choose exits, measure, policy and thresholds.

    Parameters
    ----------
    recording : Recording
        Half of its rows choose, the other half says what is to be expected.
    costs : Costs
        Of the machine at hand.
    consistency : float, default 0.95
        Share of rows that have to answer as full depth does. This is no guarantee: that is what ``calibration`` is for.
    heads : ExitHeads, optional
        Exit heads that were recorded: they go into the recipe, which can then be attached. Rules that ask probes, of
        states or of candidates, which these lack are not tried.
    points : int, default 20
        Operating points of a recipe that are tried.
    only : callable, optional
        Which recipes, by name.

    Returns
    -------
    Plan

    Examples
    --------
    >>> import torch
    >>> from exeunt.evaluation import Costs, plan
    >>> from exeunt.replay import Recording
    >>> g = torch.Generator().manual_seed(0)
    >>> recording = Recording.of_logits(4 * torch.randn(600, 1, 3, generator=g) + torch.randn(600, 6, 3, generator=g))
    >>> dear = Costs(batch=1, layers=6, stock=7.0, layer=1.0, check=6.0, leave=0.0)
    >>> print(plan(recording, dear).sentences[0])
    Early exit will not help here: the best that was found is expected to run at ...x of the stock model.
    """
    if not 0 < consistency <= 1:
        raise ValueError(f"consistency must lie in 0..1, larger than 0, got {consistency}")
    if recording.layers != costs.layers:
        raise ValueError(f"expected costs of a model with {recording.layers} layers, got {costs.layers}")
    order = torch.randperm(len(recording), generator=torch.Generator().manual_seed(0))
    half = len(recording) // 2
    if half < 1:
        raise ValueError(f"expected at least two rows, half of which choose, got {len(recording)}")
    choosing, judging = recording.take(order[:half]), recording.take(order[half:])
    best: tuple[float, Replay] | None = None
    for exits in _exit_sets(recording.exits):
        for curve in sweep(choosing.only(exits), points, only=only).values():
            for tried in curve:
                ratio = costs.ratio(tried)
                usable = _probes(tried.recipe, exits, heads)
                if usable and tried.consistency >= consistency and (best is None or ratio > best[0]):
                    best = ratio, tried
    if best is None:  # nothing is as consistent as that
        recipe = Recipe(recording.exits, measure("max_prob"), Threshold(math.inf), Drop(), heads)
    else:
        exits = best[1].recipe.exits or best[1].recording.exits
        confidence = best[1].recipe.confidence
        if confidence is not None and confidence.candidates is not None:  # as many of them as the probes were made for
            assert heads is not None  # else it was not usable
            confidence = candidate_probe(heads[exits[0]].candidates.count)  # type: ignore[union-attr]
        recipe = dataclasses.replace(best[1].recipe, exits=exits, confidence=confidence, heads=heads)
    judged, known = replay(judging, recipe), replay(judging, Recipe(recording.exits, None, Oracle(), Drop()))
    ratio, oracle = costs.ratio(judged), costs.bound(known)
    advised = recipe if ratio > 1 + NOISE else None
    return Plan(advised, judged, ratio, oracle, _advice(advised, judged, ratio, oracle, costs))


def _probes(recipe: Recipe, exits: tuple[int, ...], heads: ExitHeads | None) -> bool:
    """Whether all exits have the probes that a recipe asks."""
    part = {"probe": "probe", "candidate_probe": "candidates"}.get(recipe.measures)
    own = [] if heads is None else [heads[e] for e in exits if e in heads]
    return part is None or sum(getattr(head, part, None) is not None for head in own) == len(exits)


def _exit_sets(exits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All exits, every second of them, each alone."""
    sets = [exits, exits[1::2], *((e,) for e in exits)]
    return list(dict.fromkeys(s for s in sets if s))


def _advice(advised: Recipe | None, judged: Replay, ratio: float, oracle: float, costs: Costs) -> tuple[str, ...]:
    recipe, layers = judged.recipe, costs.layers
    exits = recipe.exits or judged.recording.exits
    left = float((judged.depth < layers - 1).double().mean())
    saved = (layers - 1 - exits[0]) * costs.layer - costs.leave
    said = []
    if advised is None:
        said.append(
            "Early exit will not help here: the best that was found is expected to run at "
            f"{ratio:.2f}x of the stock model."
        )
    else:
        said.append(
            f"Leave by {recipe.measures} ({recipe.policy}) at exits {list(exits)}: expected {ratio:.2f}x of the "
            f"stock model's speed, {judged.consistency:.1%} of answers as at full depth."
        )
    needed = costs.check / saved if saved > 0 else math.inf
    pays = f"pays if more than {needed:.0%} of the rows leave there" if needed <= 1 else "cannot pay"
    said.append(
        f"A check costs {costs.check_in_layers:.2f} layers and leaving at the first exit saves "
        f"{layers - 1 - exits[0]} of {layers}: by itself it {pays}; at this consistency {left:.0%} leave before full "
        f"depth, at {judged.mean_layers:.1f} layers on average."
    )
    if costs.batch > 1 and costs.fixed > 0.5:
        said.append(
            f"{costs.fixed:.0%} of a layer's time is the same for one row as for {costs.batch}: in a batch, a layer is "
            "paid for as long as one row runs it."
        )
    said.append(
        f"A rule that left wherever the exit agrees with full depth, and checked nothing, would run at {oracle:.2f}x."
    )
    if not judged.exact:
        said.append(f"This replay is an estimate ({judged.why}): hold a live run against it.")
    return tuple(said)
