"""The generation's state, kept where the generation keeps everything else: in its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from exeunt.policies import Position

__all__ = ["ExitCacheLayer", "GenerationState", "adopt"]


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
    prompt_length : int
        Cache length after the last forward of more than one token.
    exited : bool
        Whether a token has left early since then. Until one has, the generation runs as the stock model does, to the
        bit: rows that have ended stay in the batch too, since products round differently in a smaller one.
    finished : Tensor or None
        [B] bool, rows that were fed one of ``stop_ids``.
    """

    stop_ids: Tensor | None = None
    max_length: int | None = None
    full_depth: bool = False
    prompt_length: int = 0
    exited: bool = False
    finished: Tensor | None = None

    def begin_prompt(self, length: int) -> None:
        """A forward of several tokens ends with ``length`` tokens in the cache."""
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


class ExitCacheLayer(DynamicLayer):
    """A growing cache layer; the first one of a cache also carries the :class:`GenerationState`.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> adopt(cache).prompt_length
    0
    """

    state: GenerationState | None = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams swap rows: the state's rows go along."""
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.state is not None and self.state.finished is not None:
            self.state.finished = self.state.finished.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget keys, values and the generation."""
        super().reset()
        if self.state is not None:
            self.state.begin_prompt(0)

    def _pick(self, rows: Tensor) -> None:
        if self.state is not None and self.state.finished is not None:
            self.state.finished = self.state.finished[rows.to(self.state.finished.device)]


def adopt(cache: Any) -> GenerationState | None:
    """Give a stock ``DynamicCache`` layers that carry the generation's state; return that state.

    A cache that has been adopted before keeps its state. Keys and values that it holds stay where they are.

    Parameters
    ----------
    cache : transformers.Cache or None
        The cache of a generation.

    Returns
    -------
    GenerationState or None
        None for another kind of cache (static, sliding, quantised, offloaded), which then runs at full depth.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return None
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # layers appear as they are first used
        cache.layer_class_to_replicate = ExitCacheLayer
        if not layers:
            layers.append(ExitCacheLayer())
    if not layers:
        return None
    first = layers[0]
    if isinstance(first, ExitCacheLayer) and first.state is not None:
        return first.state
    if any(type(layer) not in (DynamicLayer, ExitCacheLayer) for layer in layers):
        return None
    for layer in layers:
        layer.__class__ = ExitCacheLayer
    first.state = GenerationState(prompt_length=int(first.get_seq_length()))
    return first.state
