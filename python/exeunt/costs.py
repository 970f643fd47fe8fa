"""What a decoding step is made of: seconds of a layer, of the head and of an exit check, measured in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from exeunt.confidence import ExitPoint
from exeunt.models import Structure
from exeunt.policies import At, Position
from exeunt.recipes import Recipe

__all__ = ["Clock", "Costs", "check_seconds"]


class Costs(NamedTuple):
    """Median seconds of one layer and of the head in a full-depth decoding step, and of one exit check.

    Examples
    --------
    >>> from exeunt.costs import Costs
    >>> costs = Costs(layer=0.004, head=0.002, check=0.003)
    >>> costs.check / costs.layer  # layers that a check costs
    0.75
    """

    layer: float
    head: float
    check: float


class Clock:
    """Times the stock model's layers and head in every decoding step that runs while it is entered.

    Parameters
    ----------
    structure : Structure
        The model's parts; nothing may be attached to them.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.costs import Clock
    >>> from exeunt.models import discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)).eval()
    >>> with (clock := Clock(discover(model))):
    ...     out = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=4, do_sample=False)
    >>> min(clock.costs(exeunt.recipes.calm([1]), rows=1)) > 0
    True
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.clear()

    def clear(self) -> None:
        """Forget what was timed."""
        self._layers: list[float] = []
        self._head: list[float] = []

    def __enter__(self) -> None:
        """Hook the model."""
        first, last, head = self.structure.layers[0], self.structure.layers[-1], self.structure.head
        self._hooks = [
            first.register_forward_pre_hook(self._start),
            last.register_forward_hook(self._stop(self._layers)),
            head.register_forward_pre_hook(self._start),
            head.register_forward_hook(self._stop(self._head)),
        ]

    def __exit__(self, *exc: object) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def costs(self, recipe: Recipe, rows: int) -> Costs:
        """Medians so far, nan without decoding steps, and what a check of ``rows`` rows costs now."""
        layers, head = (statistics.median(times or [float("nan")]) for times in (self._layers, self._head))
        return Costs(layers / len(self.structure.layers), head, check_seconds(self.structure, recipe, rows))

    def _start(self, module: Any, args: Any) -> None:
        self._since = time.perf_counter()

    def _stop(self, times: list[float]) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, args: Any, out: Any) -> None:
            if args[0].shape[1] == 1:  # not the prompt, of which the head sees one position
                times.append(time.perf_counter() - self._since)

        return note


@torch.no_grad()
def check_seconds(structure: Structure, recipe: Recipe, rows: int, repeats: int = 15) -> float:
    """Median seconds of what `attach` does at the recipe's first exit: head statistics if needed, score, decision.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.costs import check_seconds
    >>> from exeunt.models import discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> check_seconds(discover(model), exeunt.recipes.calm([1]), rows=2, repeats=3) > 0
    True
    """
    weight = structure.weight.detach()
    hidden = torch.randn(rows, weight.shape[1]).to(weight)
    shape, dtype = structure.logits_buffer(hidden, rows)
    logits = hidden.new_empty(shape, dtype=dtype)
    exits = recipe.exits or (0,)
    own, at = recipe.head(exits[0]), At(0, exits[0], len(exits), Position(1, None))

    def check() -> None:
        stats = structure.exit_stats(own.state(hidden), logits_out=logits) if recipe.reads_head else None
        point = ExitPoint(hidden, hidden, own, stats, weight.shape[0])
        bool(recipe.look(recipe.start(rows, weight.device, weight.shape[0]), point, at)[0].any())

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        check()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
