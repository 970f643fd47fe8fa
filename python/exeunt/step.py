"""One decoding step of an attached model: who still runs, who left where."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt import ops
from exeunt.generation import Token
from exeunt.models import LayerCall, RowTaker, Structure, own_cache, stand_in
from exeunt.report import FINISHED, Report

if TYPE_CHECKING:
    from exeunt.generation import GenerationState
    from exeunt.policies import State

__all__ = ["Step"]


class Step:
    """One decoding step of a batch: which rows still run, which left where, and the logits that they took along.

    ``rows`` (still running), ``left`` and ``ended`` are index tensors that partition the batch; ``rows`` is None while
    all of it runs.

    Parameters
    ----------
    batch : int
        Rows of the batch.
    depth : int
        Index of the last layer.
    state : GenerationState
        Of the generation that takes the step; rows that have ended are set aside once a token of it has left early.
    cache : transformers.Cache
        Its cache; the attribute is that of self-attention, where an encoder-decoder has two.
    length : int
        Tokens in the cache: the place of this step's token.
    device : torch.device
        Where the row indices live.
    structure : Structure
        The model's parts.
    report : Report
        What counts the step's reads of the head.

    Examples
    --------
    >>> import torch
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> from exeunt import Report
    >>> from exeunt.generation import GenerationState
    >>> from exeunt.models import discover
    >>> from exeunt.step import Step
    >>> structure = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    >>> step = Step(3, 3, GenerationState(), DynamicCache(), 5, torch.device("cpu"), structure, Report(layers=4))
    >>> step.leave(torch.tensor([False, True, False]), layer=1)
    1
    >>> step.rows, step.left, step.depth
    (tensor([0, 2]), tensor([1]), tensor([3, 1, 3]))
    """

    def __init__(
        self,
        batch: int,
        depth: int,
        state: GenerationState,
        cache: Any,
        length: int,
        device: torch.device,
        structure: Structure,
        report: Report,
    ) -> None:
        self.batch, self.state, self.length, self.report = batch, state, length, report
        self.cache, self._given = own_cache(cache), cache
        self.position = state.position(length)
        self.take = RowTaker(batch, structure.batched)
        self.depth = torch.full((batch,), depth, dtype=torch.int64, device=device)
        self.running = batch
        self.apart = False  # whether layers can attend to rows of the cache as it lies
        self.rows: Tensor | None = None
        self.left: Tensor | None = None
        self.ended: Tensor | None = None
        self.policy: State | None = None  # what the policy remembers of the running rows, from the first check on
        self.logits: Tensor | None = None  # [B, V] once a check wrote some: then every row that left has its own
        self.hidden: Tensor | None = None  # [B, 1, D] output of the last layer: exit states of rows that left
        self.lesson: tuple[Tensor, Tensor] | None = None  # [B] scores and labels at the exit, where the policy learns
        self.first: Tensor | None = None  # [B, 1, D] input of the first layer, where the state strategy asks for it
        self.rest: tuple[Any, ...] | None = None  # what the last layer that ran returned beside its output, all rows
        self.calls: list[LayerCall] | None = None  # of the segment that goes into a graph once its last layer is called
        self.started = time.perf_counter()
        if state.exited and state.finished is not None and not bool(state.finished.all()):
            self.leave(state.finished, FINISHED)
            self.ended, self.left = self.left, None

    @property
    def running_rows(self) -> Tensor:
        """[n] rows that still run."""
        return torch.arange(self.batch, device=self.depth.device) if self.rows is None else self.rows

    @cached_property
    def token(self) -> Token:
        """This step's token, as the layers that rows of it skip remember it."""
        return Token(self.length, self.depth)

    @cached_property
    def seen(self) -> Any:
        """What layers see as the cache where they run for some rows only."""
        return stand_in(self._given, self.length)

    def leave(self, go: Tensor, layer: int) -> int:
        """Rows where ``go`` (one bool for each running row) is True stop running; returns how many.

        Waits for the device once, for that number.
        """
        gone = int(go.sum())
        if gone:
            running = self.running_rows
            if gone < self.running:
                _, _, running = ops.compact(go, running)
            leaving, self.rows, self.running = running[:gone], running[gone:], self.running - gone
            self.depth.index_fill_(0, leaving, layer)
            self.left = leaving if self.left is None else torch.cat((self.left, leaving)).sort().values
        return gone
