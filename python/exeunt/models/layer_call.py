"""One stock decoder layer with the arguments that the stock model gave it, run on some rows of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from exeunt.models.structure import CACHE_KEYWORD

__all__ = ["KeyValues", "LayerCall", "RowTaker"]


class _Captured(Exception):
    """Ends a layer once its keys and values are known."""


class RowTaker:
    """Picks rows out of the tensors that the stock model hands to each of its layers, once per tensor.

    The model passes the same mask and rotary tensors to every layer, so what was picked is kept for the step. A tensor
    whose first dimension is not the batch (rotary tables shared by all rows) is left as it is.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        # By the ids of tensor and rows; both are kept in the entry, so that their ids stay their own.
        self._taken: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, value: Any, rows: Tensor) -> Any:
        """``value`` for ``rows``: tensors and tuples of tensors are picked, everything else passes."""
        if isinstance(value, tuple):
            return tuple(self(v, rows) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.batch or self.batch == 1:
            return value
        key = (id(value), id(rows))
        if key not in self._taken:
            self._taken[key] = (value.index_select(0, rows), value, rows)
        return self._taken[key][0]


class KeyValues(NamedTuple):
    """Keys and values of a layer, each [n, Hkv, 1, Dh], and how the layer addresses its cache.

    Attributes
    ----------
    keys, values : Tensor
        As the stock layer computed them.
    store : callable
        ``store(keys, values)`` writes to the generation's cache in this layer's name.
    """

    keys: Tensor
    values: Tensor
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LayerCall:
    """A decoder layer about to run one decoding step.

    Parameters
    ----------
    forward : callable
        The layer's own forward.
    hidden : Tensor
        [B, 1, D] input of the layer.
    arguments : dict
        Everything else that the stock model passed, by name; holds the cache.
    take : RowTaker
        Shared by the layers of a step.
    """

    def __init__(self, forward: Callable[..., Any], hidden: Tensor, arguments: dict[str, Any], take: RowTaker) -> None:
        self.forward, self.hidden, self.arguments, self.take = forward, hidden, arguments, take

    @property
    def cache(self) -> Any:
        """The generation's cache."""
        return self.arguments[CACHE_KEYWORD]

    def capture(self, rows: Tensor | None) -> KeyValues:
        """Keys and values that the stock layer computes for ``rows`` (None: all); nothing after them is run.

        The layer runs its own norm, projections and rotary embedding up to the point where it hands keys and values
        to the cache, and is stopped there. The cache is not written.
        """
        found: list[KeyValues] = []

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found.append(KeyValues(keys, values, lambda k, v: self.cache.update(k, v, *args, **kwargs)))
            raise _Captured

        try:
            self._call(rows, update)
        except _Captured:
            return found[0]
        raise RuntimeError(f"{self.forward!r} finished without handing keys and values to its cache")

    def run(self, rows: Tensor, attend: Callable[[KeyValues], tuple[Tensor, Tensor]]) -> Tensor:
        """Output [n, 1, D] of the layer for ``rows``.

        ``attend`` gets their keys and values, stores them, and returns all the keys and values that they attend to.
        """

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return attend(KeyValues(keys, values, lambda k, v: self.cache.update(k, v, *args, **kwargs)))

        out = self._call(rows, update)
        return out[0] if isinstance(out, tuple) else out

    def _call(self, rows: Tensor | None, update: Callable[..., tuple[Tensor, Tensor]]) -> Any:
        view = copy.copy(self.cache)  # keeps its class; only this copy's update is ours
        view.update = update
        if rows is None:
            return self.forward(self.hidden, **{**self.arguments, CACHE_KEYWORD: view})
        arguments = {k: self.take(v, rows) for k, v in self.arguments.items() if k != CACHE_KEYWORD}
        return self.forward(self.hidden.index_select(0, rows), **arguments, **{CACHE_KEYWORD: view})
