"""What a recipe is: the four concepts together."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.candidates import Candidates
from exeunt.confidence import Confidence, ExitPoint
from exeunt.heads import ExitHead, ExitHeads
from exeunt.policies import At, Evidence, Policy, State
from exeunt.states import Drop, Freeze, TokenState

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """confidence x policy x state strategy x exit heads, at chosen layers.

    Attributes
    ----------
    exits : tuple of int or None
        Layers after which a row may leave, 0-based: 0 is after the first layer. None: after every layer but the last,
        or wherever a recording has exits.
    confidence : Confidence or None
        What is measured there; None for policies that read no score.
    policy : Policy
        What is decided from it.
    state : Propagate, Defer, Recompute, Evict, Drop or Freeze
        What the skipped layers remember.
    heads : ExitHeads or None
        Exit heads by layer; an exit without one uses the model's own norm and head.

    Examples
    --------
    >>> import exeunt
    >>> from exeunt.policies import Patience
    >>> recipe = exeunt.recipes.Recipe((3, 7, 11), None, Patience(2), exeunt.states.Drop())
    >>> recipe.reads_head
    True
    """

    exits: tuple[int, ...] | None
    confidence: Confidence | None
    policy: Policy
    state: TokenState | Drop | Freeze
    heads: ExitHeads | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.state, TokenState | Drop | Freeze):
            raise TypeError(f"expected a state strategy of exeunt.states, got {self.state!r}")
        if "score" in self.policy.needs and self.confidence is None:
            raise ValueError(f"{type(self.policy).__name__} reads a score: expected a confidence measure, got none")
        if self.exits is None:
            self._check_policy(None)
            return
        if not self.exits:
            raise ValueError("exits must name at least one layer, got none")
        if any(isinstance(e, bool) or not isinstance(e, int) for e in self.exits):
            raise TypeError(f"exits must be layer indices (int), got {list(self.exits)}")
        if list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"exits must ascend without repeats, got {list(self.exits)}")
        self._check_policy(len(self.exits))
        if self.confidence is not None and self.confidence.name == "probe":
            bare = [e for e in self.exits if self.head(e).probe is None]
            if bare:
                raise ValueError(f"confidence 'probe' needs exit heads with a probe at exits {bare}, got none there")
        if self.candidates is not None:
            k = self.candidates.count
            probes = {e: getattr(self.head(e), "candidates", None) for e in self.exits}
            bare = [e for e, probe in probes.items() if probe is None or probe.count != k]
            if bare:
                raise ValueError(
                    f"confidence 'candidate_probe' needs exit heads with a probe of {k} candidates at {bare}"
                )

    def _check_policy(self, exits: int | None) -> None:
        measure = self.confidence
        low, high = (-math.inf, math.inf) if measure is None else (measure.low, measure.high)
        self.policy.check(low, high, self.measures, exits)

    def head(self, layer: int) -> ExitHead:
        """What the exit after ``layer`` has of its own; an empty head where nothing was trained for it."""
        return self.heads[layer] if self.heads is not None and layer in self.heads else ExitHead()

    def over(self, layers: int) -> Recipe:
        """The recipe for a model of so many layers: exits after all but the last, where none were named."""
        return self if self.exits is not None else dataclasses.replace(self, exits=tuple(range(layers - 1)))

    @property
    def measures(self) -> str:
        """Name of what decides: the measure, or the policy where it has none."""
        return type(self.policy).__name__ if self.confidence is None else self.confidence.name

    @property
    def reads_head(self) -> bool:
        """Whether an exit check needs the statistics of the exit's logits."""
        return (self.confidence is not None and self.confidence.reads_head) or bool(self.policy.needs - {"score"})

    @property
    def candidates(self) -> Candidates | None:
        """Words that stand for the vocabulary at an exit check, where the measure asks for some."""
        return None if self.confidence is None else self.confidence.candidates

    def start(self, rows: int, device: torch.device | str | None = None, classes: int | None = None) -> State:
        """State of rows that have passed no exit yet: the policy's, and what the measure remembers."""
        state = self.policy.start(rows, device, classes)
        if self.confidence is not None and self.confidence.remembers:
            state["earlier label"] = torch.full((rows,), -1, dtype=torch.int64, device=device)
        if self.candidates is not None:
            state["shown"] = torch.full((rows, self.candidates.count), math.nan, device=device)
        return state

    def look(self, state: State, point: ExitPoint, at: At) -> tuple[Tensor, Evidence]:
        """Look at n rows at an exit: which of them leave, and what was seen.

        Parameters
        ----------
        state : dict of str to Tensor
            Of these rows, from :meth:`start`; brought up to date.
        point : ExitPoint
            The rows; with statistics if the recipe :attr:`reads_head`.
        at : At
            Which exit this is.

        Returns
        -------
        leave : Tensor
            [n] bool.
        seen : Evidence
            For ``policy.answer``.
        """
        needs, stats, score = self.policy.needs, point.stats, None
        if "score" in needs:
            assert self.confidence is not None  # checked when the recipe was made
            if self.confidence.remembers:
                assert stats is not None
                point = dataclasses.replace(point, exit=at.exit, earlier=state["earlier label"])
                state["earlier label"] = stats.argmax
            if self.candidates is not None:
                assert point.local is not None
                shown, state["shown"] = state["shown"], point.local.float().softmax(-1)
                point = dataclasses.replace(point, shown=shown)
            score = self.confidence.score(point)
        label = None if stats is None else stats.argmax
        prob = stats.max_prob if stats is not None and "prob" in needs else None
        seen = Evidence(score, label, prob, point.logits)
        return self.policy.step(state, seen, at), seen
