"""One stock decoder layer with the arguments that the stock model gave it, run on some rows of the batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exeunt.models.attention import attend_apart, is_ranges, spelled_out
from exeunt.models.families import CACHE_KEYWORD, CACHE_KEYWORDS, KEY_WISE

__all__ = [
    "KeyValues", "LayerCall", "LayerFunction", "RowTaker", "hide_keys", "own_cache", "spread",
    "stand_in",
]  # fmt: skip


class _Captured(Exception):
    """Ends a layer once its keys and values are known."""


class RowTaker:
    """Picks rows out of the tensors that the stock model hands to each of its layers, once per tensor.

    The model passes the same mask and rotary tensors to every layer, so what was picked is kept for the step. A tensor
    whose first dimension is not the batch (rotary tables shared by all rows) is left as it is.

    Parameters
    ----------
    batch : int
        Rows of the batch.
    batched : mapping of str to int, optional
        ``Structure.batched``.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import RowTaker
    >>> take, mask, rows = RowTaker(batch=3), torch.tensor([[1], [2], [3]]), torch.tensor([0, 2])
    >>> take(mask, rows)
    tensor([[1],
            [3]])
    >>> take(mask, rows) is take(mask, rows)  # picked once for all layers
    True
    """

    def __init__(self, batch: int, batched: Mapping[str, int] | None = None) -> None:
        self.batch, self.batched = batch, batched or {}
        # By the ids of tensor and rows; both are kept in the entry, so that their ids stay their own.
        self._taken: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._apart: dict[tuple[int, int, int], tuple[Tensor | None, Any, Tensor]] = {}

    def __call__(self, value: Any, rows: Tensor, name: str = "") -> Any:
        """``value`` of the argument ``name`` for ``rows``: tensors and tuples of tensors are picked."""
        if isinstance(value, tuple):
            return tuple(self(v, rows, name) for v in value)
        times = self.batched.get(name, 1)
        if not isinstance(value, Tensor) or value.dim() == 0 or self.batch == 1 or not times:
            return value
        if value.shape[0] != self.batch * times:
            return value
        key = (id(value), id(rows))
        if key not in self._taken:
            blocks = value if times == 1 else value.unflatten(0, (self.batch, times))
            picked = blocks.index_select(0, rows)
            self._taken[key] = (picked if times == 1 else picked.flatten(0, 1), value, rows)
        return self._taken[key][0]

    def apart(self, mask: Any, rows: Tensor, length: int, seen: int) -> Tensor | None:
        """A batch's mask for ``rows`` that attend to the cache as it lies; None if it has no such form."""
        key = (id(mask), id(rows), seen)
        if key not in self._apart:
            picked = mask.index_select(0, rows) if is_ranges(mask) else mask
            own = attend_apart(picked, rows, torch.full_like(rows, length), torch.full_like(rows, seen))
            self._apart[key] = (own, mask, rows)
        return self._apart[key][0]


class KeyValues(NamedTuple):
    """Keys and values of a layer, each [n, Hkv, 1, Dh], and the cache layer that it hands them to.

    Attributes
    ----------
    keys, values : Tensor
        As the stock layer computed them.
    layer : int
        Place in the cache of the layer that they are for.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import KeyValues
    >>> own = KeyValues(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8), layer=3)
    >>> own.keys.shape, own.layer
    (torch.Size([2, 4, 1, 8]), 3)
    """

    keys: Tensor
    values: Tensor
    layer: int


class LayerCall:
    """A decoder layer about to run one decoding step.

    Parameters
    ----------
    forward : callable
        The layer's own forward.
    hidden : Tensor
        [B, 1, D] input of the layer.
    arguments : dict
        Everything else that the stock model passed, by name.
    take : RowTaker
        Shared by the layers of a step.
    cache : transformers.Cache
        What the layer is to see as its cache: a :func:`stand_in`.

    Attributes
    ----------
    apart : bool
        Whether the layer attends to rows of the cache as it lies, named by its mask (:mod:`exeunt.models.attention`):
        then it is to be given the keys and values of all rows.

    Examples
    --------
    >>> import torch
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import LayerCall, LayerFunction, RowTaker, stand_in
    >>> decoder = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval().model
    >>> hidden, layer = torch.randn(2, 1, 32), LayerFunction(decoder.layers[1])  # the fourth token of two rows
    >>> arguments = {"position_embeddings": decoder.rotary_emb(hidden, torch.tensor([[3]]))}
    >>> call = LayerCall(layer, hidden, arguments, RowTaker(2), stand_in(DynamicCache(), length=3))
    >>> own = call.pick(torch.tensor([1])).capture()  # keys and values of the second row alone
    >>> own.keys.shape, own.layer
    (torch.Size([1, 2, 1, 8]), 1)
    """

    __slots__ = ("apart", "arguments", "cache", "forward", "hidden", "take")

    def __init__(
        self, forward: Callable[..., Any], hidden: Tensor, arguments: dict[str, Any], take: RowTaker, cache: Any
    ) -> None:
        self.forward, self.hidden, self.arguments, self.take, self.cache = forward, hidden, arguments, take, cache
        self.apart = False
        arguments[CACHE_KEYWORD] = cache  # a call may wait in the cache for long: it must not hold the cache in turn

    def pick(self, rows: Tensor, apart: tuple[int, int] | None = None) -> LayerCall:
        """The same call for some rows.

        ``apart``: how many tokens there are, this one included, and how many of them the layer sees; for a model whose
        layers can attend :attr:`apart`.
        """
        arguments = {name: self.take(value, rows, name) for name, value in self.arguments.items()}
        take = RowTaker(len(rows), self.take.batched)
        picked = LayerCall(
            self.forward, self.hidden.index_select(0, rows), arguments, take, _pick_cross(self.cache, rows)
        )
        if apart is not None and arguments.get("position_bias") is None:
            mask = self.take.apart(self.arguments.get("attention_mask"), rows, *apart)
            if mask is not None:
                arguments["attention_mask"], picked.apart = mask, True
        return picked

    @staticmethod
    def join(calls: list[tuple[LayerCall, Tensor]]) -> LayerCall:
        """One call for rows of several calls of one layer, as far as keys and values need it."""
        last, rows = calls[-1]
        if len(calls) == 1:
            return last.pick(rows)
        hidden = torch.cat([call.hidden.index_select(0, rows) for call, rows in calls])
        arguments = {name: _joined([(c.arguments[name], c.take.batch, rows) for c, rows in calls])
                     for name in last.arguments}  # fmt: skip
        return LayerCall(last.forward, hidden, arguments, RowTaker(len(hidden), last.take.batched), last.cache)

    @staticmethod
    def together(
        calls: list[tuple[LayerCall, Tensor, int]],
        hidden: Tensor,
        rows: Tensor,
        slots: Tensor,
        memo: dict[Any, Any],
        apart: bool,
    ) -> LayerCall:
        """One call for rows of several calls of one layer, each of another token, that runs the layer as a whole.

        Parameters
        ----------
        calls : list of (LayerCall, Tensor, int)
            Of each token, earlier ones first: the layer's call, the [n_i] rows of it that run, and how many keys these
            attend to. Keys of all rows are aligned at their end, so that each token is the last of what it sees.
        hidden : Tensor
            [n, 1, D] input of all these rows, n the sum of the n_i.
        rows, slots : Tensor
            [n] rows of the cache that they are now, and their places in it.
        memo : dict
            Arguments put together before for the same rows; the model gives many layers the same tensors.
        apart : bool
            Whether the model's layers can attend :attr:`apart`.
        """
        last, _, keys = calls[-1]
        arguments, mask = {}, None
        if apart and all(call.arguments.get("position_bias") is None for call, _, _ in calls):
            key = ("apart", keys, *(id(call.arguments.get("attention_mask")) for call, _, _ in calls))
            if key not in memo:
                memo[key] = _apart(calls, rows, slots)
            mask = memo[key]
        for name in last.arguments:
            if name == "attention_mask" and mask is not None:
                arguments[name] = mask
                continue
            key = (name, keys, *(id(call.arguments[name]) for call, _, _ in calls))
            if key not in memo:  # the calls hold the values, so their ids stay their own
                parts = [_Part(call.arguments[name], call.take, own, seen) for call, own, seen in calls]
                memo[key] = _stacked(name, parts, keys)
            arguments[name] = memo[key]
        joined = LayerCall(
            last.forward, hidden, arguments, RowTaker(len(hidden), last.take.batched), _pick_cross(last.cache, rows)
        )
        joined.apart = mask is not None
        return joined

    def capture(self) -> KeyValues:
        """Keys and values that the stock layer computes; nothing after them is run.

        The layer runs its own norm, projections and rotary embedding up to the point where it hands keys and values
        to the cache, and is stopped there. The cache is not written.
        """
        found: list[KeyValues] = []

        def attend(own: KeyValues) -> tuple[Tensor, Tensor]:
            found.append(own)
            raise _Captured

        try:
            self.run(attend)
        except _Captured:
            return found[0]
        raise RuntimeError(f"{self.forward!r} finished without handing keys and values to its cache")

    def run(self, attend: Callable[[KeyValues], tuple[Tensor, Tensor]]) -> Any:
        """What the layer returns: [B, 1, D], or a tuple that starts with it.

        ``attend`` gets their keys and values, stores them, and returns all the keys and values that they attend to.
        """

        def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return attend(KeyValues(keys, values, layer_idx))

        own = own_cache(self.cache)
        own.update = update
        try:
            return self.forward(self.hidden, **self.arguments)
        finally:
            del own.update


def spread(value: Any, rows: Tensor, batch: int, before: Any = None) -> Any:
    """What a layer returned for ``rows`` [n] of a batch, laid out for all its rows.

    The counterpart of :class:`RowTaker`, for what a layer hands on to later ones beside its output (T5's position
    bias). The others' places hold what the last layer that ran them returned, ``before``: they may run later. A first
    dimension of one serves any row and stays.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import spread
    >>> spread(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 2]), batch=3, before=torch.full((3, 1), 9.0)).flatten()
    tensor([1., 9., 2.])
    """
    if isinstance(value, tuple):
        earlier = before if isinstance(before, tuple) else [None] * len(value)
        return tuple(spread(v, rows, batch, b) for v, b in zip(value, earlier, strict=True))
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != len(rows):
        return value
    shape = torch.Size((batch, *value.shape[1:]))
    if isinstance(before, Tensor) and before.shape == shape:
        return before.index_copy(0, rows, value)
    return value if len(rows) == 1 else value.new_zeros(shape).index_copy(0, rows, value)


def stand_in(cache: Any, length: int) -> Any:
    """An object of the cache's class that says how long the cache is and holds nothing.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> from exeunt.models import stand_in
    >>> husk = stand_in(DynamicCache(), length=7)
    >>> type(husk).__name__, husk.get_seq_length(), husk.layers
    ('DynamicCache', 7, [])
    """
    own = own_cache(cache)
    husk = copy.copy(own)
    husk.layers = []
    husk.get_seq_length = lambda layer_idx=0: length
    if own is cache:
        return husk
    both = copy.copy(cache)
    both.self_attention_cache = husk
    return both


def own_cache(cache: Any) -> Any:
    """The cache of self-attention: of an encoder-decoder's two, the one that grows.

    Examples
    --------
    >>> from transformers import DynamicCache, EncoderDecoderCache
    >>> from exeunt.models import own_cache
    >>> own = DynamicCache()
    >>> own_cache(own) is own, own_cache(EncoderDecoderCache(own, DynamicCache())) is own
    (True, True)
    """
    return getattr(cache, "self_attention_cache", cache)


class _PickedLayers(Sequence[Any]):
    """Layers of a cross-attention cache with some of their rows, picked as a layer is read."""

    def __init__(self, layers: Sequence[Any], rows: Tensor) -> None:
        self._layers, self._rows = layers, rows

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = copy.copy(self._layers[index])
        layer.keys, layer.values = (t.index_select(0, self._rows) for t in (layer.keys, layer.values))
        return layer


def _pick_cross(cache: Any, rows: Tensor) -> Any:
    """A stand-in of an encoder-decoder's caches, its cross-attention's keys and values for some rows only."""
    cross = getattr(cache, "cross_attention_cache", None)
    if cross is None:
        return cache
    both = copy.copy(cache)
    both.cross_attention_cache = copy.copy(cross)
    both.cross_attention_cache.layers = _PickedLayers(cross.layers, rows)
    return both


def hide_keys(arguments: dict[str, Any], absent: Tensor, new: int) -> dict[str, Any]:
    """Arguments of a layer with some keys of some rows hidden from attention.

    Parameters
    ----------
    arguments : dict
        What the model gave the layer.
    absent : Tensor
        [B, K] bool: keys that the layer must not see.
    new : int
        How many tokens attend to them, the last ones.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import hide_keys
    >>> mask, absent = torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.tensor([[False, True, False, False]])
    >>> hide_keys({"attention_mask": mask}, absent, new=1)["attention_mask"]
    tensor([[[[ True, False,  True,  True]]]])
    """
    hidden, count = absent[:, None, None, :], absent.shape[1]
    changed = dict(arguments)
    for name in KEY_WISE:
        value = arguments.get(name)
        if name == "attention_mask" and value is None:  # torch's own attention and exeunt's do without
            value = torch.tensor([0, count], device=absent.device)[None, None, None]
        if is_ranges(value):
            value = spelled_out(value, count, new)
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[-1] >= count:
            value = value[..., :count]  # some families' masks are longer than the keys
            changed[name] = torch.where(hidden, _masked(value), value)
    return changed


def _masked(mask: Tensor) -> Tensor:
    """What a mask or bias [..., K] says of a key that is not attended to; the last key of the last query always is."""
    if mask.dtype == torch.bool:
        return ~mask[..., -1:, -1:]
    return mask.new_tensor(torch.finfo(mask.dtype).min)


class LayerFunction:
    """A decoder layer's forward as it is now, called the same way in every family: ``function(hidden, **arguments)``.

    Families call the first parameter and the cache by names of their own; here the cache is ``CACHE_KEYWORD``.

    Parameters
    ----------
    layer : nn.Module
        The decoder layer.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import CACHE_KEYWORD, LayerFunction
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x, layer_past=None):
    ...         return x, layer_past
    >>> function = LayerFunction(Layer())
    >>> hidden, arguments = function.bind((torch.ones(1), "a cache"), {})
    >>> arguments == {CACHE_KEYWORD: "a cache"}, function(hidden, **arguments)
    (True, (tensor([1.]), 'a cache'))
    """

    def __init__(self, layer: Any) -> None:
        self._forward = layer.forward
        self._names = list(inspect.signature(self._forward).parameters)
        self._keyword = next((name for name in self._names if name in CACHE_KEYWORDS), CACHE_KEYWORD)

    def __call__(self, hidden: Tensor, **arguments: Any) -> Any:
        """Run the layer."""
        if self._keyword != CACHE_KEYWORD:
            arguments[self._keyword] = arguments.pop(CACHE_KEYWORD, None)
        return self._forward(hidden, **arguments)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Of a call as the model made it: hidden states and, by name, the other arguments: maybe ``kwargs`` itself."""
        if len(args) == 1 and self._keyword == CACHE_KEYWORD:  # nearly always
            return args[0], kwargs
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._keyword in named:
            named[CACHE_KEYWORD] = named.pop(self._keyword)
        return named.pop(self._names[0]), named


def _joined(parts: list[tuple[Any, int, Tensor]]) -> Any:
    """One argument of several calls, each with its batch and the rows wanted of it, for all these rows."""
    last = parts[-1][0]
    if isinstance(last, tuple):
        return tuple(_joined([(value[k], batch, rows) for value, batch, rows in parts]) for k in range(len(last)))
    if not isinstance(last, Tensor):
        return last
    if any(v.dim() < 2 or v.shape[0] not in (1, batch) or v.shape[1:] != last.shape[1:] for v, batch, _ in parts):
        # Masks of different lengths, positions without a batch: nothing before keys and values reads more of them than
        # that they are there (Falcon tells rotary from ALiBi by it); if something did, it would fail.
        return last.new_empty(0)
    return torch.cat([v.expand(batch, *v.shape[1:]).index_select(0, rows) for v, batch, rows in parts])


def _apart(calls: list[tuple[LayerCall, Tensor, int]], rows: Tensor, slots: Tensor) -> Tensor | None:
    """The mask of several tokens' rows that attend to the cache as it lies, if all their masks have such a form."""
    found, start = [], 0
    for call, own, seen in calls:
        mask, count = call.arguments.get("attention_mask"), len(own)
        here, ends = rows[start : start + count], slots[start : start + count] + 1
        picked = mask.index_select(0, own) if is_ranges(mask) else mask
        found.append(attend_apart(picked, here, ends, torch.full_like(ends, seen)))
        start += count
    return None if any(part is None for part in found) else torch.cat(found)  # type: ignore[arg-type]


class _Part(NamedTuple):
    """One argument of one token's call: its rows, and how many keys these attend to."""

    value: Any
    take: RowTaker
    rows: Tensor
    seen: int


def _stacked(name: str, parts: list[_Part], keys: int) -> Any:
    """One argument of calls for several tokens for all their rows, each of which attends to the last of ``keys``."""
    last = parts[-1].value
    if isinstance(last, tuple):
        return tuple(_stacked(name, [p._replace(value=p.value[k]) for p in parts], keys) for k in range(len(last)))
    if name == "attention_mask":
        parts = [p._replace(value=spelled_out(p.value, p.seen)) if is_ranges(p.value) else p for p in parts]
        parts = _spelled_out(parts, keys)
        last = parts[-1].value
    times = parts[-1].take.batched.get(name, 1)
    whole = parts[-1].take.batch * times
    if not isinstance(last, Tensor) or last.dim() < 2 or not times or last.shape[0] not in (1, whole):
        return last  # of no row in particular
    found = []
    for value, take, rows, seen in parts:
        blocks = value.expand(take.batch * times, *value.shape[1:]).unflatten(0, (take.batch, times))
        picked = blocks.index_select(0, rows).flatten(0, 1)
        # Some families' masks are longer than the keys, and they cut off the end (GPT-J on transformers 4.57).
        found.append(_aligned(picked[..., :seen], keys, name) if name in KEY_WISE else picked)
    return torch.cat(found)


def _spelled_out(parts: list[_Part], keys: int) -> list[_Part]:
    """Masks of which some are None, which hides nothing: that has to be said once rows see keys of different number."""
    given = next((p.value for p in parts if p.value is not None), None)
    if all(p.value is not None or p.seen == keys for p in parts) and given is None:
        return parts
    kind = torch.bool if given is None else given.dtype
    device = parts[-1].rows.device

    def visible(seen: int) -> Tensor:
        mask = torch.zeros(1, 1, 1, seen, dtype=kind, device=device)
        return mask if given is None or kind != torch.bool else mask | given[..., -1:, -1:].flatten()[0]

    if given is None:  # torch's own attention: True is seen
        return [p._replace(value=torch.ones(1, 1, 1, p.seen, dtype=kind, device=device)) for p in parts]
    return [p if p.value is not None else p._replace(value=visible(p.seen)) for p in parts]


def _aligned(mask: Tensor, keys: int, name: str) -> Tensor:
    """A mask or bias [..., k] for ``keys`` keys, of which the last k are those that it is for."""
    missing = keys - mask.shape[-1]
    if missing <= 0:
        return mask
    fill = mask.new_zeros(()) if name == "alibi" else _masked(mask)  # alibi only adds to what the mask decides
    return torch.cat((fill.expand(*mask.shape[:-1], missing), mask), -1)
