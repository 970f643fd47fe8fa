"""The rows of one forward of an encoder: which still run, together with which, and which left where."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from exeunt.models.encoder_structure import Layout
from exeunt.policies import State, keep

__all__ = ["Forward", "Group"]


class Group:
    """Rows that run together: where they belong, what they are, and what is remembered of them.

    Attributes
    ----------
    rows : Tensor or None
        [n] int64 places in the batch; None for all of it.
    hidden, previous : Tensor
        [n, S', D] output and input of the last layer that ran; S' is the length of the longest of these rows.
    mask : Tensor or None
        [n, S'].
    memory : dict of str to Tensor
        What exit heads remember, rows first.
    state : dict of str to Tensor
        What the policy remembers, rows first.

    Examples
    --------
    >>> import torch
    >>> from exeunt.encoder_batch import Group
    >>> group = Group(None, torch.randn(3, 5, 8), torch.ones(3, 5), memory={}, state={"count": torch.tensor([0, 1, 2])})
    >>> part = group.take(torch.tensor([0, 2]), length=4)
    >>> part.rows, part.hidden.shape, part.state
    (tensor([0, 2]), torch.Size([2, 4, 8]), {'count': tensor([0, 2])})
    """

    def __init__(
        self, rows: Tensor | None, hidden: Tensor, mask: Tensor | None, memory: dict[str, Tensor], state: State
    ) -> None:
        self.rows, self.hidden, self.previous, self.mask = rows, hidden, hidden, mask
        self.memory, self.state = memory, state
        self._picked: dict[int, tuple[Any, Any]] = {}  # by the id of what was picked from, which is kept beside it

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def take(self, rows: Tensor, length: int) -> Group:
        """Some of the rows, cut to a length."""
        hidden = self.hidden.narrow(1, 0, length).index_select(0, rows)
        mask = None if self.mask is None else self.mask.narrow(1, 0, length).index_select(0, rows)
        places = rows if self.rows is None else self.rows[rows]
        return Group(places, hidden, mask, keep(self.memory, rows), keep(self.state, rows))

    def pick(self, arguments: dict[str, Any], layout: Layout, whole: tuple[int, int]) -> dict[str, Any]:
        """The arguments of a layer for these rows; what the model hands to all of its layers is picked once."""
        own = {}
        for name, value in arguments.items():
            if id(value) not in self._picked:
                picked = layout.pick((name,), value, self.rows, self.hidden.shape[1], whole)
                self._picked[id(value)] = (picked, value)
            own[name] = self._picked[id(value)][0]
        return own


class Forward:
    """One forward of the encoder: which rows still run, which left where, and what they took along.

    Attributes
    ----------
    mask : Tensor or None
        [B, S] of the batch.
    layers : int
        Depth of the encoder.
    device : torch.device
        Of its states.
    next : int
        The layer that is called next.
    groups : list of Group
        Rows that run; empty once all have left.
    depth : Tensor
        [B] int64, the layer after which each row left; not there while none has, as ``logits``.
    logits : Tensor
        [B, C] of rows that left, zeros for the others.
    final : Tensor or None
        [B, S, D] states of rows that left, in their places; None while none has.
    room : Tensor or None
        What checks in one call share; None where there are none.

    Examples
    --------
    >>> import torch
    >>> from exeunt.encoder_batch import Forward, Group
    >>> run = Forward(None, layers=4, device=torch.device("cpu"))
    >>> run.size = (2, 5)
    >>> group = Group(None, torch.randn(2, 5, 8), None, {}, {})
    >>> run.leave(group, torch.tensor([1]), torch.randn(1, 3), layer=1)
    >>> run.depth, run.whole
    (tensor([3, 1]), False)
    """

    depth: Tensor
    logits: Tensor

    def __init__(self, mask: Tensor | None, layers: int, device: torch.device) -> None:
        self.mask, self.layers, self.device = mask, layers, device
        self.next = self.layer_rows = self.layer_tokens = self.checks = 0
        self.size = (0, 0)  # rows and tokens
        self.returned = 0  # how many things a layer returns beside the tensor, if it returns a tuple
        self.groups: list[Group] = []
        self.final: Tensor | None = None
        self.room: Tensor | None = None
        self.lengths: Tensor | None = None
        self.started = time.perf_counter()

    def count(self, group: Group) -> None:
        """A layer has run for a group."""
        n, length, _ = group.hidden.shape
        self.layer_rows += n
        self.layer_tokens += n * length

    @property
    def whole(self) -> bool:
        """Whether every row of the batch still runs."""
        return self.final is None

    def leave(self, group: Group, rows: Tensor | None, logits: Tensor, layer: int) -> None:
        """Rows of a group (None: all) stop after a layer."""
        if self.final is None and rows is None:
            self.final, self.logits, self.depth = group.hidden, logits, self._everyone(layer)
            return
        if self.final is None:
            self.final, self.depth = group.hidden.clone(), self._everyone(self.layers - 1)
            self.logits = logits.new_zeros(self.size[0], logits.shape[1])
            assert rows is not None
            places = rows
        else:
            hidden = group.hidden if rows is None else group.hidden.index_select(0, rows)
            assert group.rows is not None
            places = group.rows if rows is None else group.rows[rows]
            self.place(places, hidden)
        self.depth.index_fill_(0, places, layer)
        self.logits.index_copy_(0, places, logits)

    def finish(self) -> None:
        """No row leaves any more."""
        if self.final is None:
            self.depth = self._everyone(self.layers - 1)

    def _everyone(self, layer: int) -> Tensor:
        return torch.full((self.size[0],), layer, dtype=torch.int64, device=self.device)

    def place(self, places: Tensor, hidden: Tensor) -> None:
        """Put states [n, S', D] where they belong in the batch."""
        assert self.final is not None
        self.final.narrow(1, 0, hidden.shape[1]).index_copy_(0, places, hidden)
