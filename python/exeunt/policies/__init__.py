"""Policies: what an exit sees, and saw at the exits before it -> leave or stay.

A policy is a frozen dataclass: its fields are the rule's parameters. What it remembers of the rows is kept outside, in
a *state*: a dict of tensors whose first dimension is the rows, so that whoever takes rows out of a batch does the same
for every policy: ``state = keep(state, rows)``. Where the rows of a step are, :class:`At` says; what they show there,
:class:`Evidence`. For a batch of rows that passes the exits, one after the other::

    state = policy.start(rows, device, classes)          # {} where nothing is remembered
    for at in ...:                                       # the exits, in order
        if policy.looks(at):                             # else: nothing has to be computed for it here
            leave = policy.step(state, seen, at)         # [n] bool; state is brought up to date
            answer = policy.answer(keep(state, leave), seen.take(leave), at)
            state = keep(state, ~leave)                  # the rows that go on
    # full depth, only if policy.answers: step once more with at.exit == at.exits; then all rows that are left answer

In a decoder each token starts afresh; in an encoder the state goes through the layers with its rows. ``needs`` names
the fields of `Evidence` that a policy reads, so that a host computes those alone. Scores that are not finite let no
row leave, and a label of -1 (:class:`exeunt.ExitStats` of a row with NaN) agrees with none.

Examples
--------
A policy of one's own: leave once the score has hardly moved since the exit before.

>>> import math, torch
>>> from dataclasses import dataclass
>>> from exeunt.policies import At, Evidence, Policy, keep
>>> @dataclass(frozen=True)
... class Settled(Policy):
...     change: float
...
...     needs = frozenset({"score"})
...
...     def start(self, rows, device=None, classes=None):
...         return {"score": torch.full((rows,), math.nan, device=device)}
...
...     def step(self, state, seen, at):
...         moved = (seen.score - state["score"]).abs()
...         state["score"] = seen.score
...         return moved < self.change  # NaN, as at the first exit, stays
>>> policy = Settled(0.1)
>>> state = policy.start(2)
>>> policy.step(state, Evidence(torch.tensor([0.5, 0.6])), At(exit=0, layer=3, exits=2))
tensor([False, False])
>>> policy.step(state, Evidence(torch.tensor([0.9, 0.62])), At(exit=1, layer=7, exits=2))
tensor([False,  True])

It goes into a recipe like the others: ``exeunt.recipes.Recipe(exits=(3, 7), policy=Settled(0.1), ...)``.
"""

from exeunt.policies.accumulate import Accumulate, Halting
from exeunt.policies.adaptive import Adaptive
from exeunt.policies.depth import Falling, FixedDepth, Oracle
from exeunt.policies.labels import Patience, Vote, Window
from exeunt.policies.protocol import At, Evidence, FirstOf, Policy, Position, State, keep
from exeunt.policies.threshold import Decay, Threshold

__all__ = [
    "Accumulate",
    "Adaptive",
    "At",
    "Decay",
    "Evidence",
    "Falling",
    "FirstOf",
    "FixedDepth",
    "Halting",
    "Oracle",
    "Patience",
    "Policy",
    "Position",
    "State",
    "Threshold",
    "Vote",
    "Window",
    "keep",
]
