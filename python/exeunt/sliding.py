"""The cache layer of sliding-window attention, with rows that leave at different depths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exeunt.cache import ExitCacheLayer
from exeunt.models import KeyValues

__all__ = ["SlidingExitCacheLayer"]


class SlidingExitCacheLayer(ExitCacheLayer):
    """An :class:`~exeunt.cache.ExitCacheLayer` that shows attention no more than its window.

    Stands in for transformers' ``DynamicSlidingWindowLayer``: the same tokens are handed to attention, so the same bits
    come out. Tokens that have left the window stay in memory: so a cache can be cropped at any length, and what a layer
    owes stays at its place.

    Attributes
    ----------
    sliding_window : int
        Tokens of the window.

    Examples
    --------
    >>> import torch
    >>> from transformers.cache_utils import DynamicSlidingWindowLayer
    >>> from exeunt.sliding import SlidingExitCacheLayer
    >>> layer = DynamicSlidingWindowLayer(sliding_window=4)
    >>> SlidingExitCacheLayer.adopt(layer)
    >>> for _ in range(6):
    ...     keys, values = layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    >>> keys.shape, layer.keys.shape  # what attention sees, and what is kept
    (torch.Size([1, 2, 4, 8]), torch.Size([1, 2, 6, 8]))
    """

    is_sliding = True
    record_past = False  # nothing is ever dropped, so nothing has to be recorded
    sliding_window: int

    @property
    def cumulative_length(self) -> int:  # type: ignore[override]
        """Tokens in the layer, as transformers calls them."""
        return self.length

    def activate_past_recording(self) -> None:
        """Do nothing: all tokens are kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, T, Dh] keys and values; return those that the T tokens may attend to."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return self._window(keys, key_states.shape[2]), self._window(values, key_states.shape[2])

    def append(self, own: KeyValues, rows: Tensor, gather: bool = True) -> tuple[Tensor, Tensor]:
        """Append one token for ``rows`` [n] only; return what it may attend to, [n, Hkv, <= window, Dh].

        Without ``gather`` all keys and values of the whole batch, as they lie.
        """
        keys, values = super().append(own, rows, gather)
        return (self._window(keys, 1), self._window(values, 1)) if gather else (keys, values)

    def seen(self, length: int) -> int:
        """How many keys the last of ``length`` tokens attends to, itself included: no more than the window."""
        return min(length, self.sliding_window)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of what :meth:`update` will return, for the attention mask."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]  # 4.57 passes positions
        offset = max(self.length - self.sliding_window + 1, 0)
        return self.length - offset + count, offset

    def get_max_length(self) -> int:
        """Tokens of the window."""
        return self.sliding_window

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def _window(self, held: Tensor, new: int) -> Tensor:
        seen = min(held.shape[2], self.sliding_window - 1 + new)
        return held.narrow(2, held.shape[2] - seen, seen)

    @staticmethod
    def adopt(layer: Any) -> None:
        """Make a stock ``DynamicSlidingWindowLayer`` one of these; tokens that it has dropped keep their places."""
        seen = layer.get_seq_length()
        keys, values = (vars(layer).pop(name) for name in ("keys", "values"))
        for name in ("cumulative_length", "record_past"):
            vars(layer).pop(name, None)
        layer.__class__ = SlidingExitCacheLayer
        if keys is not None and seen:
            keys, values = (
                torch.cat([t.new_zeros(*t.shape[:2], seen - t.shape[2], t.shape[3]), t], 2) for t in (keys, values)
            )
        layer.keys, layer.values = keys, values
