"""The generation's state, kept where the generation keeps everything else: in its cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exeunt.deferred import Deferred
from exeunt.models import KeyValues, LayerCall
from exeunt.ops import KVCache
from exeunt.policies import Position

__all__ = ["GenerationState", "Skipped", "Token"]


@dataclass(eq=False)
class Token:
    """A token of the batch whose rows skipped layers.

    Attributes
    ----------
    slot : int
        Its place in the cache.
    depth : Tensor
        [B] int64: the layer after which each row of its decoding step left.
    origin : Tensor or None
        [B] int64: the row of the decoding step that each row of the cache comes from; None while rows have not moved.

    Examples
    --------
    >>> import torch
    >>> from exeunt.generation import Token
    >>> token = Token(slot=7, depth=torch.tensor([1, 3, 1]))
    >>> token.origin = torch.tensor([2, 0])  # the cache has kept two rows, in another order
    >>> token.locate(torch.tensor([0]))
    (tensor([1]), tensor([0]))
    """

    slot: int
    depth: Tensor
    origin: Tensor | None = None

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the step's ``rows`` [n]: where they are in the cache now, and which row of the step each of these was."""
        if self.origin is None:
            return rows, rows
        now = torch.isin(self.origin, rows).nonzero().flatten()
        return now, self.origin[now]


class Skipped(NamedTuple):
    """A layer that owes its cache keys and values: for ``token``, in the step's ``rows``, as ``call`` gives them.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import CACHE_KEYWORD
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> cache = DynamicCache()
    >>> with torch.no_grad(), exeunt.attach(model, exeunt.recipes.calm([1], 0.0, lazy=True)):
    ...     for ids in (torch.tensor([[3, 5, 7]]), torch.tensor([[9]])):
    ...         out = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
    ...     owed = cache.layers[2].state.pending  # layers 2 and 3 are skipped
    >>> [(layer, skipped.token.slot, skipped.rows.tolist()) for layer in owed for skipped in owed[layer]]
    [(2, 3, [0]), (3, 3, [0])]
    """

    token: Token
    call: LayerCall
    rows: Tensor


@dataclass
class GenerationState:
    """What one generation remembers between steps, beside keys and values.

    Attributes
    ----------
    stop_ids : Tensor or None
        Token ids that end a row; None where nobody said, or where beams decide what ends.
    max_length : int or None
        Prompt and new tokens together, as ``generate`` bounds them.
    full_depth : bool
        No exits at all (assisted decoding checks its drafts at full depth).
    prompt_end : int
        Cache length from which on forwards of one token are decoding steps.
    prompt_length : int
        Cache length after the last forward that was no decoding step.
    exited : bool
        Whether a token has left early since then. Until one has, the generation runs as the stock model does, to the
        bit: rows that have ended stay in the batch too, since products round differently in a smaller one.
    finished : Tensor or None
        [B] bool, rows that were fed one of ``stop_ids``.
    pending : dict
        By cache layer: what it still owes. The layer settles it before anything reads its keys and values.
    fill : callable or None
        ``fill([(call, rows), ...]) -> KeyValues``: the state strategy's keys and values of one layer, flat over all
        the rows of all the calls.
    deferred : Deferred or None
        Tokens that wait to run their deep layers, where the state strategy lets them wait.
    owner : weakref or None
        The model that fills the cache.
    table : KVCache or None
        Where all layers hold their keys and values; None once one of them has moved.

    Examples
    --------
    >>> import torch
    >>> from exeunt.generation import GenerationState
    >>> state = GenerationState(stop_ids=torch.tensor([0]), max_length=10)
    >>> state.begin_prompt(4)
    >>> state.feed(torch.tensor([[5], [0]]))
    >>> state.finished, state.position(6)
    (tensor([False,  True]), Position(produced=3, limit=6))
    """

    stop_ids: Tensor | None = None
    max_length: int | None = None
    full_depth: bool = False
    prompt_end: int = 1
    prompt_length: int = 0
    exited: bool = False
    finished: Tensor | None = None
    pending: dict[int, list[Skipped]] = field(default_factory=dict)
    fill: Callable[[list[tuple[LayerCall, Tensor]]], KeyValues] | None = None
    deferred: Deferred | None = None
    owner: weakref.ref[Any] | None = None
    table: KVCache | None = None

    def begin_prompt(self, length: int) -> None:
        """A forward of the prompt, or of several tokens, ends with ``length`` tokens in the cache."""
        self.prompt_length, self.exited, self.finished = length, False, None

    def feed(self, ids: Tensor | None) -> None:
        """Rows that are fed ``ids`` [B, 1] are finished if that ends them; None: not known, nothing changes."""
        if ids is None or self.stop_ids is None:
            return
        ended = torch.isin(ids[:, 0], self.stop_ids.to(ids.device))
        self.finished = ended if self.finished is None else self.finished | ended

    def position(self, length: int) -> Position:
        """Position of the token decoded while the cache holds ``length`` tokens."""
        limit = None if self.max_length is None else max(self.max_length - self.prompt_length, 1)
        return Position(length - self.prompt_length + 1, limit)

    @property
    def waiting(self) -> int:
        """Tokens that some layer still owes keys and values for."""
        late = self.deferred.most if self.deferred is not None else 0
        return max(late, *map(len, self.pending.values())) if self.pending else late

    def owes(self, layer: int) -> bool:
        """Whether something is to be done before the keys and values of a layer can be read."""
        late = self.deferred
        return layer in self.pending or (late is not None and len(late) > 0 and not late.under_way)

    def pick(self, rows: Tensor) -> None:
        """The cache's row b becomes what row ``rows[b]`` was."""
        if self.finished is not None:
            self.finished = self.finished[rows.to(self.finished.device)]
        if self.deferred is not None:
            self.deferred.pick(rows)
        for token in {skipped.token for owed in self.pending.values() for skipped in owed}:
            token.origin = rows if token.origin is None else token.origin[rows]

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy: whoever continues it says anew for which model, and how layers are filled in."""
        return {**vars(self), "pending": {}, "fill": None, "deferred": None, "owner": None, "table": None}
