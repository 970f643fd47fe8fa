"""Writing what skipped layers owe a cache: all of it in one kv_fill where the model's weights allow that.

Where they do not (an adapter on a projection, a norm or an embedding that ``kv_fill`` does not know), each layer's own
code computes its keys and values, one layer at a time: :meth:`ExitCacheLayer.settle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt.models import KeyValueWeights, rotary_of
from exeunt.ops import KVCache, KVStack, kv_fill

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer
    from exeunt.generation import Skipped

__all__ = ["fill_in"]


@torch.no_grad()
def fill_in(
    layers: Sequence[ExitCacheLayer], weights: KeyValueWeights | None, first: int = 0, until: int | None = None
) -> int:
    """Write what the layers ``first <= l < until`` of a cache owe.

    Parameters
    ----------
    layers : sequence of ExitCacheLayer
        All layers of the cache.
    weights : KeyValueWeights or None
        Of the model; None: every layer's own code.
    first, until : int
        Which layers; by default all.

    Returns
    -------
    int
        Layer-rows that kv_fill wrote; the layers count what they write themselves.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> from exeunt.fill import fill_in
    >>> from exeunt.models import CACHE_KEYWORD, KeyValueWeights, discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> weights, cache = KeyValueWeights.find(discover(model)), DynamicCache()
    >>> with torch.no_grad(), exeunt.attach(model, exeunt.recipes.calm([1], 0.0, lazy=True)):
    ...     for ids in (torch.tensor([[3, 5, 7]]), torch.tensor([[9]])):
    ...         out = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
    ...     fill_in(cache.layers, weights)  # the last token has skipped layers 2 and 3
    2
    """
    until = len(layers) if until is None else until
    state = layers[0].state
    owing = [i for i in range(first, until) if state is not None and i in state.pending]
    if state is None or not owing:
        return 0
    stack = None if weights is None else weights.current()
    # Under autocast keys and values are of other dtypes than the weights, and need not even agree with each other.
    if stack is None or weights is None or any(t.dtype != stack.dtype for i in owing for t in layers[i].storage):
        for i in owing:
            layers[i].settle()
        return 0
    return _fill_at_once(layers, stack, weights.rotates, owing)


def _fill_at_once(
    layers: Sequence[ExitCacheLayer], stack: KVStack, rotates: Sequence[bool], owing: Sequence[int]
) -> int:
    state = layers[0].state
    assert state is not None
    deepest: dict[Any, Skipped] = {}  # of each token: there it has the most rows that left, with their exit states
    for i in reversed(owing):
        for skipped in state.pending[i]:
            deepest.setdefault(skipped.token, skipped)
    found = []
    for token, skipped in deepest.items():
        now, then = token.locate(skipped.rows)
        if now.numel():
            found.append((token, skipped, now, then))
    first, until = owing[0], owing[-1] + 1
    count = 0
    if found:
        hidden = torch.cat([skipped.call.hidden[:, 0].index_select(0, then) for _, skipped, _, then in found])
        depth = torch.cat([token.depth.index_select(0, then) for token, _, _, then in found])
        rows = torch.cat([now for _, _, now, _ in found])
        slots = torch.cat([torch.full_like(now, token.slot) for token, _, now, _ in found])
        for i in owing:
            layers[i].reserve()
        from_layer = depth.add(1).clamp_(min=first)
        if state.table is None:
            state.table = KVCache(*zip(*(layer.storage for layer in layers), strict=True))
        tables = _rotary(state.pending, found, rotates, owing, len(layers))
        kv_fill(hidden, from_layer, rows, slots, stack, state.table, rotary=tables, until=until)
        if all(token.origin is None for token, *_ in found):
            count = sum(len(skipped.rows) for i in owing for skipped in state.pending[i])
        else:  # rows have moved, and some are gone
            count = int((until - from_layer).sum())
    for i in owing:
        del state.pending[i]
    return count


def _rotary(
    pending: dict[int, list[Skipped]],
    found: list[tuple[Any, Skipped, Tensor, Tensor]],
    rotates: Sequence[bool],
    owing: Sequence[int],
    depth: int,
) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor] | None]:
    """The tables of all the rows as the model gave them: one pair where all layers got the same, else by layer."""
    made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    tables: list[tuple[Tensor, Tensor] | None] = [None] * depth
    for i in owing:
        if not rotates[i]:
            continue
        own = {skipped.token: skipped.call for skipped in pending[i]}
        pairs = [rotary_of(own.get(token, skipped.call).arguments) for token, skipped, _, _ in found]
        key = tuple(map(id, pairs))
        if key not in made:
            parts = [[_rows(t, then) for t in pair] for pair, (_, _, _, then) in zip(pairs, found, strict=True) if pair]
            cos, sin = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
            made[key] = cos, sin
        tables[i] = made[key]
    pairs = [tables[i] for i in owing]
    return pairs[0] if pairs[0] is not None and all(pair is pairs[0] for pair in pairs) else tables


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, R] of a table [B or 1, 1, R]."""
    return table[:, 0].expand(len(rows), -1) if len(table) == 1 else table[:, 0].index_select(0, rows)
