"""One decoding step of an attached model: who still runs, who left where."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exeunt.models.layer_call import RowTaker
from exeunt.report import FINISHED

if TYPE_CHECKING:
    from exeunt.cache import GenerationState

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
    length : int
        Tokens in its cache.
    device : torch.device
        Where the row indices live.
    """

    def __init__(self, batch: int, depth: int, state: GenerationState, length: int, device: torch.device) -> None:
        self.batch, self.state, self.position = batch, state, state.position(length)
        self.take = RowTaker(batch)
        self.depth = torch.full((batch,), depth, dtype=torch.int64, device=device)
        self.running = batch
        self.rows: Tensor | None = None
        self.left: Tensor | None = None
        self.ended: Tensor | None = None
        self.logits: Tensor | None = (
            None  # [B, V] once a check has written logits: then every row that left has its own
        )
        self.hidden: Tensor | None = None  # [B, 1, D] output of the last layer: exit states of rows that left
        self.started = time.perf_counter()
        if state.exited and state.finished is not None and not bool(state.finished.all()):
            self.leave(state.finished, FINISHED)
            self.ended, self.left = self.left, None

    def leave(self, go: Tensor, layer: int) -> int:
        """Rows where ``go`` (one bool for each running row) is True stop running; returns how many."""
        stay = (~go).nonzero().flatten()
        gone = go.nonzero().flatten()
        if gone.numel() == 0:
            return 0
        rows = torch.arange(self.batch, device=go.device) if self.rows is None else self.rows
        leaving = rows[gone]
        self.depth[leaving] = layer
        self.left = leaving if self.left is None else torch.cat((self.left, leaving)).sort().values
        self.rows, self.running = rows[stay], int(stay.numel())
        return int(gone.numel())
