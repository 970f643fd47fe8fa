"""Tokens that left early and wait in their cache, to run through the deep layers beside a later token that goes there.

One row of a batch, exits after layers 1 and 3; a dot is a layer that ran with its token, o one that ran later::

    layer 5   .  .  .     o  o  o  .     .     A token that leaves waits in the state in which it left. Tokens wait at
    layer 4   .  .  .     o  o  o  .     .     depths that never grow from one to the next, since a later token that
    layer 3   .  .  .     o  o  .  .     .     goes deeper takes all of them along. So whoever runs a layer finds the
    layer 2   .  .  .     o  o  .  .  w  .     keys and values of every earlier token there: those that a model without
    layer 1   .  .  .     .  .  .  .  .  .     exits would have.
              prompt      ^  ^  ^ left       w waits (until a later token goes deeper)

A token that runs along is one more row of the layer's batch: with the arguments (mask, rotary tables) that the model
gave it in its own step, and with its own row's keys up to itself, so that it is the last of what it attends to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt.models import LayerCall

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer
    from exeunt.step import Step

__all__ = ["Company", "Deferred"]


class Company:
    """Waiting tokens that run the same layers together.

    Attributes
    ----------
    places : Tensor
        [m] int64: which of the waiting entries they are, in the order of their slots.
    rows, slots : Tensor
        [m] int64 rows of the cache and places in it.
    sources : list of (int, Tensor)
        By slot, the rows of the token's own decoding step, whose arguments these entries take.
    memo : dict
        Arguments that were put together for a layer, for the next ones, which mostly get the same tensors.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> from transformers import DynamicCache
    >>> from exeunt.deferred import Deferred
    >>> cache = DynamicCache()
    >>> waiting = Deferred(cache, again=False, count=lambda rows: None)
    >>> for slot in (7, 8):  # row 0 leaves twice after layer 1
    ...     step = SimpleNamespace(depth=torch.tensor([1, 3]), length=slot, first=None, lesson=None)
    ...     waiting.leave(1, step, torch.zeros(2, 1, 8))
    >>> waiting.gather(2, None)
    >>> waiting.company.rows, waiting.company.slots
    (tensor([0, 0]), tensor([7, 8]))
    """

    def __init__(self, places: Tensor, waiting: Deferred) -> None:
        self.places = places
        self.rows, self.slots = waiting.row[places], waiting.slot[places]
        origins = waiting.origin[places]
        self.sources = [(slot, origins[self.slots == slot]) for slot in self.slots.unique().tolist()]
        self.memo: dict[Any, Any] = {}


class Deferred:
    """What waits in one generation: an entry for each row and token that left early.

    Parameters
    ----------
    cache : transformers.Cache
        Of the generation, with exeunt's layers; referred to weakly.
    again : bool
        Tokens that wait start from the first layer with every step, instead of where they left.
    count : callable
        Told how many layer-rows run for tokens of earlier steps.
    deepened : callable, optional
        ``deepened(scores, labels, hidden)`` hears of entries [m] that have run all layers: what their exit saw of them
        (``Step.lesson``), and the last layer's output [m, 1, D].

    Attributes
    ----------
    slot, row, origin, depth : Tensor
        [n] int64, ascending by slot: place in the cache, row of the cache, row of the token's own decoding step, and
        the layer whose output ``hidden`` is (-1: none has run).
    hidden, first : Tensor
        [n, 1, D] state to go on with, and input of the first layer (kept if ``again``).
    under_way : bool
        Whether a decoding step has begun and not ended.
    company : Company or None
        Those that run along in it.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> from transformers import DynamicCache
    >>> from exeunt.deferred import Deferred
    >>> cache = DynamicCache()
    >>> waiting = Deferred(cache, again=False, count=lambda rows: None)
    >>> step = SimpleNamespace(depth=torch.tensor([1, 3]), length=7, first=None, lesson=None)
    >>> waiting.leave(1, step, torch.zeros(2, 1, 8))  # row 0 has left after layer 1, row 1 goes on
    >>> len(waiting), waiting.slot, waiting.row
    (1, tensor([7]), tensor([0]))
    >>> waiting.crop(7)  # the cache forgets that token
    >>> len(waiting)
    0
    """

    def __init__(
        self,
        cache: Any,
        again: bool,
        count: Callable[[int], None],
        deepened: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> None:
        self._cache, self._again, self._count, self._deepened = weakref.ref(cache), again, count, deepened
        self._calls: dict[int, dict[int, LayerCall]] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all that waits."""
        empty = torch.zeros(0, dtype=torch.int64)
        self.slot = self.row = self.origin = self.depth = empty
        self.hidden = self.first = torch.zeros(0, 1, 0)
        self._at_start = self._entries()
        self.company: Company | None = None
        self.under_way = self.apart = False

    def __len__(self) -> int:
        """Entries that wait."""
        return len(self.slot)

    @property
    def most(self) -> int:
        """Tokens that wait, of the row with the most of them."""
        return int(self.row.bincount().max()) if len(self) else 0

    # ---- what happens in a decoding step

    def note(self, slot: int, layer: int, call: LayerCall) -> None:
        """How the model called ``layer`` for the token at ``slot``."""
        self._calls.setdefault(slot, {})[layer] = call

    def begin(self, rows: Tensor | None, apart: bool) -> None:
        """A step begins that runs ``rows`` (None: all); the model's layers can attend ``apart``, or not."""
        self.company, self.under_way, self.apart = None, True, apart
        self._at_start = self._entries()
        for stale in self._calls.keys() - set(self.slot.tolist()):
            del self._calls[stale]
            self._seen.pop(stale, None)
        if self._again and len(self):
            started = self._of(rows)
            self.depth = torch.where(started, -1, self.depth)
            self.hidden = torch.where(started[:, None, None], self.first, self.hidden)

    def abandon(self) -> None:
        """A step has failed: what waits is what waited when it began, and has run no layer since."""
        self._hold(self._at_start)
        self.company, self.under_way = None, False

    def gather(self, layer: int, rows: Tensor | None) -> None:
        """From ``layer`` on, those of ``rows`` (None: all) that wait for it run along."""
        self.company = None
        if len(self):
            places = ((self.depth == layer - 1) & self._of(rows)).nonzero()[:, 0]
            self.company = Company(places, self) if len(places) else None

    def _of(self, rows: Tensor | None) -> Tensor:
        return torch.ones_like(self.row, dtype=torch.bool) if rows is None else torch.isin(self.row, rows)

    def leave(self, layer: int, step: Step, hidden: Tensor) -> None:
        """Those rows of a step that have just left after ``layer``, whose output is ``hidden`` [B, 1, D], wait."""
        rows = (step.depth == layer).nonzero()[:, 0]
        first = hidden if step.first is None else step.first
        if step.lesson is not None:
            self._seen[step.length] = step.lesson
        new = (torch.full_like(rows, step.length), rows, rows, torch.full_like(rows, layer), hidden[rows], first[rows])
        held = self._entries()
        self._hold(new if not len(self) else [torch.cat(pair) for pair in zip(held, new, strict=True)])

    def run(self, i: int, layer: ExitCacheLayer, current: tuple[LayerCall, Tensor, int] | None = None) -> Any:
        """Run layer i for the company, and for ``current`` (call, rows, slot); return what the latter get, if any."""
        company = self.company
        assert company is not None
        calls = [(self._calls[slot][i], origin, layer.seen(slot + 1)) for slot, origin in company.sources]
        hidden, rows, slots, latest = self.hidden[company.places], company.rows, company.slots, company.sources[-1][0]
        if current is not None:
            call, own, latest = current
            calls.append((call, own, layer.seen(latest + 1)))
            hidden = torch.cat((hidden, call.hidden.index_select(0, own)))
            rows, slots = torch.cat((rows, own)), torch.cat((slots, torch.full_like(own, latest)))
        joined = LayerCall.together(calls, hidden, rows, slots, company.memo, self.apart)
        out = joined.run(lambda new: layer.append_at(new, rows, slots, latest, gather=not joined.apart))
        after, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        late = len(company.places)
        self._count(late)
        self.hidden = self.hidden.index_copy(0, company.places, after[:late])
        self.depth = self.depth.index_fill(0, company.places, i)
        if i == len(self._layers()) - 1:
            self._finish(i)
        if current is None:
            return None
        return after[late:], _last(rest, late, len(rows))

    def _layers(self) -> Sequence[ExitCacheLayer]:
        cache = self._cache()
        return () if cache is None else cache.layers

    def _finish(self, last: int) -> None:
        """Let those go that have run the last layer."""
        done = self.depth == last
        if self._deepened is not None:
            places = [k for k in done.nonzero()[:, 0].tolist() if int(self.slot[k]) in self._seen]
            seen = [(t[self.origin[k]] for t in self._seen[int(self.slot[k])]) for k in places]
            if seen:
                scores, labels = (torch.stack(part) for part in zip(*seen, strict=True))
                self._deepened(scores, labels, self.hidden[places])
        self._keep((~done).nonzero()[:, 0])
        self.company = None

    # ---- what happens between steps

    def pick(self, rows: Tensor) -> None:
        """The cache's row b becomes what row ``rows[b]`` was."""
        if len(self):
            now, places = (rows[:, None] == self.row).nonzero().unbind(1)
            order = places.argsort(stable=True)  # ascending by slot, as before
            self._keep(places[order])
            self.row = now[order]

    def crop(self, length: int) -> None:
        """The cache holds ``length`` tokens; later ones are gone."""
        self._keep((self.slot < length).nonzero()[:, 0])

    def _entries(self) -> list[Tensor]:
        return [self.slot, self.row, self.origin, self.depth, self.hidden, self.first]

    def _hold(self, entries: Sequence[Tensor]) -> None:
        self.slot, self.row, self.origin, self.depth, self.hidden, self.first = entries

    def _keep(self, places: Tensor) -> None:
        self._hold([t[places] for t in self._entries()])

    @torch.no_grad()
    def flush(self) -> None:
        """Run all that waits through all its layers: from then on the cache is that of a model without exits.

        In the middle of a step nothing happens: whoever runs a layer has its company with it.
        """
        if self.under_way or not len(self):
            return
        layers = self._layers()
        for i in range(int(self.depth.min()) + 1, len(layers)):
            self.gather(i, None)
            if self.company is not None:
                self.run(i, layers[i])


def _last(value: Any, late: int, rows: int) -> Any:
    """Of what a layer returned for ``rows`` rows, those after the first ``late``."""
    if isinstance(value, tuple):
        return tuple(_last(v, late, rows) for v in value)
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value[late:]
    return value
