"""Replay: what any recipe would have done, from one recorded run.

A policy reads nothing but what exits show: record that once, at every exit and at full depth, and every recipe runs on
it in milliseconds. That is *exact* where an exit changes nothing that others see: rows of an encoder, fixed depths. It
is an *estimate* where it does: a token that left early hands propagated keys and values to the tokens behind it, and a
generation goes on from other words. :class:`Replay` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from exeunt.confidence import Confidence, ExitPoint
from exeunt.heads import ExitHead
from exeunt.policies import At, Evidence, FixedDepth, Oracle, Policy, Position, keep
from exeunt.recipes import Recipe
from exeunt.states import Defer, Drop
from exeunt.stats import ExitStats

__all__ = ["FEW", "Recording", "Replay", "replay"]

FEW = 64  # classes up to which a recording keeps whole logits
STATISTICS = ("top1", "top2", "sumexp", "weighted")


@dataclass(eq=False)
class Recording:
    """What n rows showed at E exits and at full depth.

    Attributes
    ----------
    exits : tuple of int
        0-based layers of the E exits, ascending.
    layers : int
        Layers of the model.
    classes : int
        Number of labels, or of words.
    statistics : Tensor
        [n, E + 1, 4] float32: top1, top2, sumexp and weighted of :class:`exeunt.ExitStats`, at full depth last.
    predicted : Tensor
        [n, E + 1] int64; -1 for NaN.
    logits : Tensor or None
        [n, E + 1, C] float32, where classes are few.
    measures : dict of str to Tensor
        [n, E + 1] float32 scores that logits don't give (``probe``, ``saturation``); NaN where there is none.
    labels : Tensor or None
        [n] int64, the truth.
    positions : Tensor or None
        [n] int64, for tokens: new tokens before this one in its generation.
    limit : int or None
        New tokens that a generation might produce.
    costs : tuple of float or None
        Layers that a row has cost when it leaves at each exit, and at full depth; by default those that it ran through.
    about : dict
        What it belongs to: fingerprints of model, exit heads and data.

    Examples
    --------
    >>> import torch, exeunt
    >>> recording = exeunt.replay.Recording.of_logits(torch.randn(100, 6, 3))
    >>> recording.exits, recording.layers, len(recording)
    ((0, 1, 2, 3, 4), 6, 100)
    """

    exits: tuple[int, ...]
    layers: int
    classes: int
    statistics: Tensor
    predicted: Tensor
    logits: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    positions: Tensor | None = None
    limit: int | None = None
    costs: tuple[float, ...] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depths = len(self.exits) + 1
        if list(self.exits) != sorted(set(self.exits)) or not self.exits or self.exits[0] < 0:
            raise ValueError(f"a recording's exits must be layers that ascend without repeats, got {list(self.exits)}")
        if self.exits[-1] >= self.layers - 1:
            raise ValueError(f"exits must lie before the last of {self.layers} layers, got {list(self.exits)}")
        if self.costs is not None and len(self.costs) != depths:
            raise ValueError(f"costs must be one for each exit and full depth ({depths}), got {len(self.costs)}")
        n = len(self.predicted)
        for name, tensor, shape in (
            ("statistics", self.statistics, (n, depths, len(STATISTICS))),
            ("predicted", self.predicted, (n, depths)),
            ("logits", self.logits, (n, depths, self.classes)),
            ("labels", self.labels, (n,)),
            ("positions", self.positions, (n,)),
            *((name, scores, (n, depths)) for name, scores in self.measures.items()),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"a recording's {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        self._scores: dict[tuple[Confidence, tuple[int, ...], tuple[int, ...] | None], Tensor] = {}

    def __len__(self) -> int:
        return len(self.predicted)

    @classmethod
    def of_logits(
        cls,
        logits: ArrayLike | Tensor,
        *,
        exits: Sequence[int] | None = None,
        layers: int | None = None,
        labels: ArrayLike | Tensor | None = None,
        measures: Mapping[str, ArrayLike | Tensor] | None = None,
        **more: Any,
    ) -> Recording:
        """Recording of logits that are at hand.

        Parameters
        ----------
        logits : array
            [n, E + 1, C], at each exit and at full depth.
        exits : sequence of int, optional
            Layers of the exits; by default 0..E-1.
        layers : int, optional
            Of the model; by default E + 1.
        labels : array, optional
            [n] int, the truth.
        measures : mapping, optional
            [n, E + 1] scores by the name of the measure.
        more
            ``positions``, ``limit``, ``costs``, ``about``.
        """
        z = _tensor(logits, torch.float32)
        if z.dim() != 3 or z.shape[1] < 2:
            raise ValueError(f"logits must have shape [n, exits + 1, classes], got {list(z.shape)}")
        n, depths, classes = z.shape
        stats = ExitStats.from_logits(z.flatten(0, 1))
        exits = range(depths - 1) if exits is None else exits
        return cls(
            exits=tuple(exits),
            layers=depths if layers is None else layers,
            classes=classes,
            statistics=torch.stack([getattr(stats, name) for name in STATISTICS], -1).view(n, depths, -1),
            predicted=stats.argmax.view(n, depths),
            logits=z if classes <= FEW else None,
            measures={name: _tensor(scores, torch.float32) for name, scores in (measures or {}).items()},
            labels=None if labels is None else _tensor(labels, torch.int64),
            **more,
        )

    def columns(self, exits: Sequence[int] | None) -> tuple[int, ...]:
        """Where the recording has these exits (None: all of them), full depth last."""
        missing = [e for e in exits or () if e not in self.exits]
        if missing:
            raise ValueError(f"the recording has exits {list(self.exits)}, the recipe asks for {missing} too")
        chosen = self.exits if exits is None else exits
        return (*(self.exits.index(e) for e in chosen), len(self.exits))

    def cost(self, columns: Sequence[int]) -> Tensor:
        """Layers that a row has cost at these columns, [len(columns)] float64."""
        costs = self.costs or (*(e + 1 for e in self.exits), self.layers)
        return torch.tensor([float(costs[c]) for c in columns], dtype=torch.float64)

    def stats(self, column: int) -> ExitStats:
        """Statistics at one exit."""
        return ExitStats(self._predicted[column], *self._statistics[column])

    def scores(self, confidence: Confidence, columns: tuple[int, ...], looked: tuple[int, ...] | None = None) -> Tensor:
        """Scores [len(columns), n] of a measure, which remembers those of the exits that are looked at; None: all."""
        key = (confidence, columns, looked if confidence.remembers else None)
        if key not in self._scores:
            if confidence.reads_head:
                none, head = torch.empty(len(self), 0), ExitHead()
                earlier, rows = torch.full((len(self),), -1), []
                for k, c in enumerate(columns[:-1] if confidence.remembers else columns):
                    logits = None if self.logits is None else self.logits[:, c]
                    stats = self.stats(c)
                    rows.append(
                        confidence.score(ExitPoint(none, none, head, stats, self.classes, logits, k, earlier)).float()
                    )
                    if looked is None or k in looked:
                        earlier = stats.argmax
                rows += [torch.full((len(self),), torch.nan)] * (len(columns) - len(rows))
                scores = torch.stack(rows)
            elif confidence.name in self.measures:
                scores = self.measures[confidence.name].T[list(columns)].contiguous()
            else:
                has = ", ".join(self.measures) or "none"
                raise ValueError(
                    f"{confidence.name} is no function of logits: expected recorded scores of it, got {has}"
                )
            self._scores[key] = scores
        return self._scores[key]

    def take(self, rows: Tensor | slice) -> Recording:
        """Recording of some rows."""
        pick = lambda t: None if t is None else t[rows]  # noqa: E731
        return Recording(
            self.exits, self.layers, self.classes, self.statistics[rows], self.predicted[rows], pick(self.logits),
            {name: scores[rows] for name, scores in self.measures.items()}, pick(self.labels), pick(self.positions),
            self.limit, self.costs, self.about,
        )  # fmt: skip

    def only(self, exits: Sequence[int]) -> Recording:
        """Recording of some of the exits."""
        c = list(self.columns(tuple(exits)))
        return Recording(
            tuple(exits), self.layers, self.classes, self.statistics[:, c], self.predicted[:, c],
            None if self.logits is None else self.logits[:, c],
            {name: scores[:, c] for name, scores in self.measures.items()}, self.labels, self.positions, self.limit,
            None if self.costs is None else tuple(self.costs[k] for k in c), self.about,
        )  # fmt: skip

    @cached_property
    def _statistics(self) -> Tensor:
        return self.statistics.permute(1, 2, 0).contiguous()  # [E + 1, 4, n]: exits are read one after the other

    @cached_property
    def _predicted(self) -> Tensor:
        return self.predicted.T.contiguous()

    @cached_property
    def _logits(self) -> Tensor | None:
        return None if self.logits is None else self.logits.transpose(0, 1).contiguous()

    @cached_property
    def _prob(self) -> Tensor:
        return 1 / self._statistics[:, STATISTICS.index("sumexp")]


@dataclass(frozen=True, eq=False)
class Replay:
    """What a recipe does on a recording.

    Attributes
    ----------
    recording : Recording
        The rows.
    recipe : Recipe
        The rule.
    exit : Tensor
        [n] int64 index among the recipe's exits at which each row left; their number for full depth.
    depth : Tensor
        [n] int64, the 0-based layer.
    cost : Tensor
        [n] float64 layers that each row cost.
    label : Tensor
        [n] int64, what it answers.
    exact : bool
        Whether a live run would decide the same.
    why : str
        Why, in a sentence.

    Examples
    --------
    >>> import torch, exeunt
    >>> g = torch.Generator().manual_seed(0)
    >>> logits = 4 * torch.randn(100, 1, 3, generator=g) + torch.randn(100, 6, 3, generator=g)
    >>> recording = exeunt.replay.Recording.of_logits(logits)
    >>> strict, loose = (exeunt.replay.replay(recording, exeunt.recipes.shallow_deep(t)) for t in (0.99, 0.6))
    >>> strict.mean_layers > loose.mean_layers, strict.consistency > loose.consistency, loose.exact
    (True, True, True)
    """

    recording: Recording
    recipe: Recipe
    exit: Tensor
    depth: Tensor
    cost: Tensor
    label: Tensor
    exact: bool
    why: str

    @property
    def mean_layers(self) -> float:
        """Layers that a row cost on average."""
        return float(self.cost.mean())

    @property
    def speedup(self) -> float:
        """Layers of the model over layers run: what could be gained if nothing else took time."""
        return self.recording.layers / self.mean_layers

    @property
    def consistency(self) -> float:
        """Share of rows that answer as full depth does."""
        return float((self.label == self.recording.predicted[:, -1]).double().mean())

    @property
    def accuracy(self) -> float:
        """Share of rows that answer with the right label."""
        if self.recording.labels is None:
            raise ValueError("accuracy needs labels: expected a recording that has them, got none")
        return float((self.label == self.recording.labels).double().mean())

    def __str__(self) -> str:
        kind = "exact" if self.exact else "estimate"
        right = "" if self.recording.labels is None else f", {self.accuracy:.1%} right"
        return (
            f"{self.mean_layers:.2f} of {self.recording.layers} layers, {self.consistency:.1%} as full depth{right} "
            f"({kind}: {self.why})"
        )


@torch.no_grad()
def replay(recording: Recording, recipe: Recipe) -> Replay:
    """Run a recipe on a recording.

    Parameters
    ----------
    recording : Recording
        What was recorded; exits that the recipe doesn't name are passed by.
    recipe : Recipe
        Without exits of its own: at all that were recorded.

    Returns
    -------
    Replay

    Raises
    ------
    ValueError
        One sentence: exits or scores that were not recorded, a measure that the policy can't use, thresholds out of
        range, missing labels, whole logits or positions that a policy needs.

    Examples
    --------
    >>> import torch, exeunt
    >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 0.1], [3.0, 0.0]], [[0.2, 0.0], [0.0, 5.0], [0.0, 9.0]]])
    >>> recording = exeunt.replay.Recording.of_logits(logits, labels=[0, 1])
    >>> print(exeunt.replay.replay(recording, exeunt.recipes.shallow_deep(0.9)))
    1.50 of 3 layers, 100.0% as full depth, 100.0% right (exact: rows don't see each other)
    """
    columns = recording.columns(recipe.exits)
    policy, measure = recipe.policy, recipe.confidence
    low, high = (-np.inf, np.inf) if measure is None else (measure.low, measure.high)
    policy.check(low, high, recipe.measures, len(columns) - 1)
    seen = _evidence(recording, recipe, columns)
    if policy.answers and recording.positions is not None:
        name = type(policy).__name__
        raise ValueError(f"expected a policy whose tokens take their exit's own word, got {name} on recorded tokens")
    n, exits = len(recording), len(columns) - 1
    left, label = torch.full((n,), exits), recording.predicted[:, -1].clone()
    for position, rows in _positions(recording, policy):
        _run(policy, seen, columns, recording, position, rows, left, label)
    layers = torch.tensor([*(recording.exits[c] for c in columns[:-1]), recording.layers - 1])
    exact, why = _exactness(recording, recipe)
    return Replay(recording, recipe, left, layers[left], recording.cost(columns)[left], label, exact, why)


def _run(
    policy: Policy,
    seen: list[Evidence],
    columns: tuple[int, ...],
    recording: Recording,
    position: Position | None,
    rows: Tensor,
    left: Tensor,
    label: Tensor,
) -> None:
    """Send rows through the exits; note where they leave and what they answer."""
    exits, everything = len(columns) - 1, len(rows) == len(left)
    state = policy.start(len(rows), classes=recording.classes)
    for k, c in enumerate(columns):
        at = At(k, recording.exits[c] if k < exits else recording.layers - 1, exits, position)
        if not len(rows) or (at.last and not policy.answers):
            return
        if not policy.looks(at):
            continue
        here = seen[k] if everything and len(rows) == len(left) else seen[k].take(rows)
        leave = policy.step(state, here, at)
        if at.last:
            leave = torch.ones_like(leave)
        elif not leave.any():
            continue
        go, stay = leave.nonzero()[:, 0], (~leave).nonzero()[:, 0]
        answer = policy.answer(keep(state, go), here.take(go), at)
        gone = rows[go]
        left[gone] = k
        label[gone] = recording._predicted[c][gone] if answer.label is None else answer.label
        rows, state = rows[stay], keep(state, stay)


def _evidence(recording: Recording, recipe: Recipe, columns: tuple[int, ...]) -> list[Evidence]:
    """What all rows show at each column, of what the policy needs."""
    needs, policy = recipe.policy.needs, type(recipe.policy).__name__
    ats = [At(k, recording.exits[c], len(columns) - 1) for k, c in enumerate(columns[:-1])]
    looked = tuple(at.exit for at in ats if recipe.policy.looks(at))
    scores = recording.scores(recipe.confidence, columns, looked) if "score" in needs and recipe.confidence else None
    logits = recording._logits if "logits" in needs else None
    if "logits" in needs and logits is None:
        raise ValueError(
            f"{policy} needs whole logits, which are kept for {FEW} classes at most, got {recording.classes} classes"
        )
    truth = _truth(recording, recipe.policy) if "truth" in needs else None
    return [
        Evidence(
            None if scores is None else scores[k],
            recording._predicted[c] if "label" in needs else None,
            recording._prob[c] if "prob" in needs else None,
            None if logits is None else logits[c],
            truth,
        )
        for k, c in enumerate(columns)
    ]


def _truth(recording: Recording, policy: Policy) -> Tensor:
    if isinstance(policy, Oracle) and policy.kind == "consistency":
        return recording.predicted[:, -1]
    if recording.labels is None:
        raise ValueError(f"{type(policy).__name__} needs labels: expected a recording that has them, got none")
    return recording.labels


def _positions(recording: Recording, policy: Policy) -> list[tuple[Position | None, Tensor]]:
    """Rows by their position in a generation, if the policy asks for it."""
    if not policy.positional:
        return [(None, torch.arange(len(recording)))]
    if recording.positions is None:
        raise ValueError(f"{type(policy).__name__} follows positions: expected recorded tokens, got rows without any")
    found = recording.positions.unique().tolist()
    return [(Position(p, recording.limit), (recording.positions == p).nonzero()[:, 0]) for p in found]


def _exactness(recording: Recording, recipe: Recipe) -> tuple[bool, str]:
    if recording.positions is None or isinstance(recipe.state, Drop):
        return True, "rows don't see each other"
    if isinstance(recipe.state, Defer):
        return True, "on the recorded words, skipped layers run later: no token changes what others see"
    if isinstance(recipe.policy, FixedDepth):
        return True, "on the recorded words, no token needs what another skipped"
    return False, "tokens that leave change what later ones attend to, and the words"


def _tensor(values: ArrayLike | Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach().cpu().to(dtype)
