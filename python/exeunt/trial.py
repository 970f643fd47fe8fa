"""A trial of a state strategy on a model, as exits are put on: what would go wrong later is refused at once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt.models import CACHE_KEYWORD, evaluating, near, own_cache, trial_forward
from exeunt.states import Evict

if TYPE_CHECKING:
    from exeunt.decoder import Attached
    from exeunt.step import Step

__all__ = ["try_state"]


class _FirstRowLeaves:
    """Stands in for the exit points: row 0 leaves at the first exit of the first step, nobody leaves otherwise."""

    def __init__(self, exit: int) -> None:
        self.heads, self.used = {exit: None}, False

    def check(self, i: int, step: Step, before: Tensor, after: Tensor) -> None:
        if not self.used:
            self.used = True
            step.leave(torch.tensor([True, False], device=after.device), i)

    def logits(self, stock: Any, normed: Tensor, step: Step) -> Tensor:
        return stock(normed)


@torch.no_grad()
def try_state(early: Attached) -> None:
    """Let a token leave, a second one go deep, and compare with what the state strategy promises.

    Parameters
    ----------
    early : Attached
        With its exits on. Its report is reset.

    Raises
    ------
    ValueError
        Where a strategy that promises the keys and values of full depth does not give them on this model, or where a
        layer attends to keys that were evicted.

    Examples
    --------
    >>> import dataclasses, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.trial import try_state
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> recipe = dataclasses.replace(exeunt.recipes.calm([1]), state=exeunt.states.Defer())
    >>> with exeunt.attach(model, recipe) as early:  # which has tried it once already
    ...     try_state(early)
    """
    model, state = early.model, early.recipe.state
    name = f"{type(state).__name__} on {type(model).__name__}"
    points, early._points = early._points, _FirstRowLeaves(min(early._points.heads))  # type: ignore[assignment]
    try:
        with evaluating(model):
            with early.paused():
                start = trial_forward(model, 2, 4, use_cache=True)[CACHE_KEYWORD]
            cache = copy.deepcopy(start)
            trial_forward(model, 2, 1, **{CACHE_KEYWORD: cache}, use_cache=True)
            if isinstance(state, Evict):
                _check_evicted(model, cache, name)
                return
            got = trial_forward(model, 2, 1, **{CACHE_KEYWORD: cache}, use_cache=True).logits
            with early.paused():
                for _ in range(2):
                    want = trial_forward(model, 2, 1, **{CACHE_KEYWORD: start}, use_cache=True).logits
            if not near(got, want):
                raise ValueError(
                    f"attach: {name} does not give the output of full depth: expected layers that can run several "
                    "tokens of a row as rows of their own; Propagate works with this model"
                )
    finally:
        early._points = points
        early.reset_report()


def _check_evicted(model: Any, cache: Any, name: str) -> None:
    """Keys that are not there have no influence, whatever stands in their place."""
    outputs = []
    for value in (0.0, 1.0):
        own = copy.deepcopy(cache)
        for layer in own_cache(own).layers:
            absent = layer.absent(0)
            if absent is not None:
                rows, slots = absent.nonzero().unbind(1)
                layer.reserve()
                for held in layer.storage:
                    held[rows, :, slots] = value
        outputs.append(trial_forward(model, 2, 1, **{CACHE_KEYWORD: own}, use_cache=True).logits)
    if not torch.equal(*outputs):
        raise ValueError(
            f"attach: {name} attends to keys that were evicted: expected layers that take a mask; Propagate works with "
            "this model"
        )
