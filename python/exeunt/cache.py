"""Cache layers that append in place, row by row, and that carry the generation's state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from exeunt.generation import GenerationState, Skipped, Token
from exeunt.memory import zeros_on_huge_pages
from exeunt.models import KeyValues, LayerCall

__all__ = ["ExitCacheLayer", "adopt"]

_HUGE = 1 << 22  # bytes from which a layer's keys lie on huge pages: attention over them reads faster


class ExitCacheLayer(DynamicLayer):
    """A cache layer that appends in place, row by row where rows leave at different depths.

    Stands in for transformers' ``DynamicLayer``: ``keys`` and ``values`` read as [B, Hkv, length, Dh] tensors that
    later tokens do not change. Behind them lies room for more tokens (half as many again, at least 64, no more than
    the generation can need), so that a step writes one token where concatenation copies them all.

    Attributes
    ----------
    length : int
        Tokens in the layer.
    state : GenerationState or None
        Of the generation; the layers of a cache share it.
    index : int
        Place of the layer in its cache.

    Examples
    --------
    >>> import torch
    >>> layer = ExitCacheLayer()
    >>> for _ in range(3):
    ...     keys, values = layer.update(torch.ones(2, 4, 1, 8), torch.ones(2, 4, 1, 8))
    >>> keys.shape, layer.get_seq_length()
    (torch.Size([2, 4, 3, 8]), 3)
    """

    # Defaults for the time before __init__ and adopt have run.
    state: GenerationState | None = None
    index = 0
    length = 0
    _keys: Tensor | None = None  # [B, Hkv, capacity, Dh], zero from `length` on if our own
    _values: Tensor | None = None
    _absent: Tensor | None = None  # [B, <= length] bool: tokens that the layer has not seen and never will
    _own = False  # allocated here: nobody else writes to it, and there may be room behind `length`

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, length, Dh] keys, None before the first token."""
        self.settle()
        return self._visible(self._keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._replace(value, self.values)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, length, Dv] values, None before the first token."""
        self.settle()
        return self._visible(self._values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._replace(self.keys, value)

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take dtype, device and shapes from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        value_states = key_states if value_states is None else value_states
        self._replace(key_states.detach()[:, :, :0], value_states.detach()[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, T, Dh] keys and values; return all of them.

        Raises
        ------
        ValueError
            For another batch, head count, head size or dtype than the layer holds.
        """
        if not self.length:
            self.lazy_initialization(key_states, value_states)
        state = self.state
        if state is not None and state.owes(self.index):
            self.settle()
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # autograd is for tensors, not for room
        start, count = self.length, key_states.shape[2]
        self._reserve(start + count)
        assert self._keys is not None and self._values is not None
        keys, values = self._keys.narrow(2, start, count), self._values.narrow(2, start, count)
        _expect("keys", key_states, keys, keys.shape)
        _expect("values", value_states, values, values.shape)
        keys.copy_(key_states)
        values.copy_(value_states)
        self.length = end = start + count
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)

    def get_seq_length(self) -> int:
        """Tokens in the layer, those included that it still owes keys and values for."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was."""
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self._keys is not None:
            self._pick(torch.arange(self._keys.shape[0], device=self._keys.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self._keys is not None:
            self._pick(torch.arange(self._keys.shape[0], device=self._keys.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget keys, values and the generation."""
        if self.state is not None:
            self.state.pending.pop(self.index, None)
            if self.state.deferred is not None:
                self.state.deferred.clear()
        self._absent = None
        super().reset()
        if self.state is not None and self.index == 0:
            self.state.begin_prompt(0)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy starts from: nothing pending, and no room that two layers could both write to."""
        return {**vars(self), "_keys": self.keys, "_values": self.values, "_own": False}

    # ---- what a decoding step asks of it

    @torch.no_grad()
    def append(self, own: KeyValues, rows: Tensor, gather: bool = True) -> tuple[Tensor, Tensor]:
        """Append one token for ``rows`` [n] only; the other rows' places are left zero.

        Returns all the keys and values of these rows, [n, Hkv, length, Dh]; without ``gather`` those of the whole batch
        as they lie.
        """
        if self.state is not None and self.index in self.state.pending:
            self.settle()
        self._reserve(self.length + 1)
        self._check(own, len(rows))
        assert self._keys is not None and self._values is not None
        self._keys.select(2, self.length).index_copy_(0, rows, own.keys[:, :, 0])
        self._values.select(2, self.length).index_copy_(0, rows, own.values[:, :, 0])
        self.length += 1
        keys, values = self._keys.narrow(2, 0, self.length), self._values.narrow(2, 0, self.length)
        return (keys.index_select(0, rows), values.index_select(0, rows)) if gather else (keys, values)

    @torch.no_grad()
    def append_at(
        self, own: KeyValues, rows: Tensor, slots: Tensor, latest: int, gather: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Write tokens of ``rows`` [n] at ``slots`` [n], of which the last is ``latest``.

        Returns the keys and values that each of them attends to, [n, Hkv, K, Dh], aligned at their end: the last is the
        token's own. What stands before the first token of a row is some token's; masks hide it. Without ``gather``
        those of the whole batch, as they lie.
        """
        length = latest + 1
        self._reserve(max(length, self.length))
        self._check(own, len(rows))
        assert self._keys is not None and self._values is not None
        self._keys[rows, :, slots] = own.keys[:, :, 0]
        self._values[rows, :, slots] = own.values[:, :, 0]
        self.length = max(length, self.length)
        if not gather:
            return self._keys.narrow(2, 0, self.length), self._values.narrow(2, 0, self.length)
        seen = self.seen(length)
        at = slots[:, None] + torch.arange(1 - seen, 1, device=slots.device)
        at.clamp_(min=0)
        keys, values = (t[rows[:, None], :, at].transpose(1, 2) for t in (self._keys, self._values))
        return keys, values

    def seen(self, length: int) -> int:
        """How many keys the last of ``length`` tokens attends to, itself included."""
        return length

    def pass_by(self, slot: int) -> None:
        """A token passes without leaving keys and values here, in some or all rows; its place stays zero."""
        self._reserve(slot + 1)
        self.length = slot + 1

    def evict(self, slot: int, rows: Tensor) -> None:
        """``rows`` [n] of the token at ``slot`` leave no keys and values here: no later token sees them."""
        self.pass_by(slot)
        assert self._keys is not None
        held = self._absent
        absent = torch.zeros(self._keys.shape[0], self.length, dtype=torch.bool, device=rows.device)
        if held is not None:
            absent[:, : held.shape[1]] = held
        absent[rows, slot] = True
        self._absent = absent

    def absent(self, new: int) -> Tensor | None:
        """[B, K] bool of the keys that a forward of ``new`` more tokens is given: which of them it must not see."""
        if self._absent is None:
            return None
        missing = self.length + new - self._absent.shape[1]
        absent = torch.nn.functional.pad(self._absent, (0, missing))
        return absent[:, absent.shape[1] - (self.seen(self.length + 1) + new - 1) :]

    def owe(self, token: Token, call: LayerCall, rows: Tensor) -> None:
        """``rows`` [n] of a token skip this layer: :meth:`settle` will write their keys and values."""
        assert self.state is not None
        self.state.pending.setdefault(self.index, []).append(Skipped(token, call, rows))
        self.length = token.slot + 1

    @torch.no_grad()
    def settle(self) -> None:
        """Write the keys and values that this layer owes, for all tokens at once."""
        if self.state is None:
            return
        if self.state.deferred is not None:
            self.state.deferred.flush()
        if self.index not in self.state.pending:
            return
        owed = self.state.pending[self.index]
        self.reserve()
        assert self._keys is not None and self._values is not None and self.state.fill is not None
        located = [(token.slot, call, *token.locate(rows)) for token, call, rows in owed]
        if any(now.numel() for _, _, now, _ in located):
            filled = self.state.fill([(call, then) for _, call, _, then in located])
            slots = torch.cat([torch.full_like(now, slot) for slot, _, now, _ in located])
            rows = torch.cat([now for _, _, now, _ in located])
            self._check(filled, len(rows))
            self._keys[rows, :, slots] = filled.keys[:, :, 0]
            self._values[rows, :, slots] = filled.values[:, :, 0]
        del self.state.pending[self.index]

    def reserve(self) -> None:
        """Make sure that every token of the layer has a place that may be written to."""
        self._reserve(self.length)

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, capacity, Dh] as they are, whatever the layer owes."""
        assert self._keys is not None and self._values is not None
        return self._keys, self._values

    def lies_in(self, keys: Tensor) -> bool:
        """Whether these are the tensors that the layer writes to, by the address of its keys."""
        return self._own and self._keys is not None and self._keys.data_ptr() == keys.data_ptr()

    def move_into(self, keys: Tensor, values: Tensor) -> None:
        """Go on in these tensors [B, Hkv, capacity, Dh]; nobody else may write to them."""
        for held, new in zip(self.storage, (keys, values), strict=True):
            _put(held.narrow(2, 0, min(held.shape[2], self.length)), new)
        self._keys, self._values, self._own = keys, values, True
        self._moved()

    # ---- storage

    def _visible(self, held: Tensor | None) -> Tensor | None:
        return held.narrow(2, 0, self.length) if held is not None and self._own else held

    def _replace(self, keys: Tensor | None, values: Tensor | None) -> None:
        """Hold tensors that somebody else may hold too."""
        self._own = False
        self._keys, self._values = keys, values
        self._moved()
        self.length = 0 if keys is None or keys.dim() < 4 else keys.shape[2]
        if self._absent is not None:
            self._absent = self._absent[:, : self.length]
        if self.state is not None and self.state.deferred is not None:  # a step that failed has left tokens waiting
            self.state.deferred.crop(self.length)

    def _check(self, own: KeyValues, rows: int) -> None:
        """Raise ValueError unless these are this layer's keys and values, one token for each of ``rows``."""
        if own.layer != self.index:
            raise ValueError(f"cache: expected decoder layer {self.index} to use its own cache layer, got {own.layer}")
        for what, new, held in (("keys", own.keys, self._keys), ("values", own.values, self._values)):
            assert held is not None
            _expect(what, new, held, torch.Size((rows, held.shape[1], 1, held.shape[3])))

    def _reserve(self, length: int) -> None:
        """Make sure that ``length`` tokens have a place that may be written to."""
        held = self._keys
        assert held is not None
        if self._own and length <= held.shape[2] and (not held.is_inference() or torch.is_inference_mode_enabled()):
            return
        limit = self.state.max_length if self.state is not None else None
        capacity = length + max(length // 2, 64)
        self._move(None, min(capacity, limit) if limit is not None and limit >= length else capacity)

    def _pick(self, rows: Tensor) -> None:
        if self.state is not None and self.index == 0:
            self.state.pick(rows)
        if self._absent is not None:
            self._absent = self._absent[rows.to(self._absent.device)]
        if self._keys is not None and self.length:
            self._move(rows.to(self._keys.device), self._keys.shape[2])

    def _move(self, rows: Tensor | None, capacity: int) -> None:
        """Copy what is held (of ``rows``, in that order) to tensors with room for ``capacity`` tokens."""
        self._keys, self._values = (self._copied(t, rows, capacity) for t in (self._keys, self._values))
        self._own = True
        self._moved()

    def _moved(self) -> None:
        if self.state is not None:
            self.state.table = None

    def _copied(self, held: Tensor | None, rows: Tensor | None, capacity: int) -> Tensor:
        assert held is not None
        part = held.narrow(2, 0, min(held.shape[2], self.length))
        if rows is not None:
            part = part.index_select(0, rows)
        shape = part.shape[0], held.shape[1], capacity, held.shape[3]
        large = held.is_cpu and math.prod(shape) * held.itemsize >= _HUGE
        new = zeros_on_huge_pages(shape, held.dtype) if large else held.new_empty(shape)
        _put(part, new)
        return new


def _put(held: Tensor, new: Tensor) -> None:
    """Copy the tokens of [B, Hkv, n, Dh] to a tensor with room for more, zero behind them."""
    filled = held.shape[2]
    new.narrow(2, 0, filled).copy_(held)
    new.narrow(2, filled, new.shape[2] - filled).zero_()


def _expect(what: str, new: Tensor, held: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless ``new`` has the shape, and the dtype and device of ``held``."""
    if new.shape != shape or new.dtype != held.dtype or new.device != held.device:
        raise ValueError(
            f"cache: expected {what} of shape {[*shape]} in {held.dtype} on {held.device} to go on with, "
            f"got {[*new.shape]} in {new.dtype} on {new.device}"
        )


def adopt(cache: Any, depth: int) -> GenerationState | None:
    """Give a stock ``DynamicCache`` layers that carry the generation's state; return that state.

    A cache that has been adopted before keeps its state. Keys and values that it holds stay where they are.

    Parameters
    ----------
    cache : transformers.Cache or None
        The cache of a generation.
    depth : int
        Decoder layers of the model.

    Returns
    -------
    GenerationState or None
        None for another kind of cache (static, quantised, offloaded).

    Raises
    ------
    ValueError
        For a cache with fewer layers than the model.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> adopt(DynamicCache(), 4).prompt_length
    0
    """
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return None
    if len(layers) >= depth and isinstance(layers[0], ExitCacheLayer) and layers[0].state is not None:
        return layers[0].state
    from exeunt.sliding import SlidingExitCacheLayer  # here, since it builds on this module

    stock = (DynamicLayer, DynamicSlidingWindowLayer)
    if any(type(layer) not in (*stock, ExitCacheLayer, SlidingExitCacheLayer) for layer in layers):
        return None
    if len(layers) < depth:
        if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
            raise ValueError(f"cache: expected {depth} layers like the model's, got {len(layers)}")
        layers.extend(ExitCacheLayer() for _ in range(depth - len(layers)))  # they would appear as they are first used
    state = GenerationState(prompt_length=int(layers[0].get_seq_length()))
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            SlidingExitCacheLayer.adopt(layer)
        elif type(layer) is DynamicLayer:
            keys, values = vars(layer).pop("keys"), vars(layer).pop("values")
            layer.__class__ = ExitCacheLayer
            layer.keys, layer.values = keys, values
        layer.state, layer.index = state, index
    return state
