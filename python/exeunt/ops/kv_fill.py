"""kv_fill: keys and values of the layers that rows skipped, written to the cache in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.ops import _backend
from exeunt.ops.kv_stack import KVCache, KVStack

__all__ = ["kv_fill"]

Rotary = tuple[Tensor, Tensor]


def kv_fill(
    hidden: Tensor,
    from_layer: Tensor,
    rows: Tensor,
    slots: Tensor,
    stack: KVStack,
    cache: KVCache,
    *,
    rotary: Rotary | Sequence[Rotary | None] | None = None,
    until: int | None = None,
) -> None:
    """Write the keys and values that skipped layers owe the cache.

    For every row n and every layer l with ``from_layer[n] <= l < until``: x = norm_l(hidden[n]); its keys are
    rope(key_norm(Wk x + bk)), its values Wv x + bv, written to ``cache.keys[l][rows[n], :, slots[n]]`` and
    ``cache.values[l]``. All skipped layers see the same hidden state, so its statistics are taken once, and all their
    weights are read in one pass, once for all rows.

    Parameters
    ----------
    hidden : Tensor
        [N, D] states in which the rows left, float32, bfloat16 or float16.
    from_layer : Tensor
        [N] int64, first layer that each row skipped, 0..L.
    rows, slots : Tensor
        [N] int64, where in the cache: row 0..B-1 and position 0..S-1. A negative slot is padding: nothing is written.
    stack : KVStack
        The model's norms and projections.
    cache : KVCache
        Its keys and values, written in place.
    rotary : (cos, sin) or sequence of them, optional
        [N, R] tables as the model makes them (one entry for each rotated element of a head, R <= Dh), for all layers
        or one pair a layer (None where a layer has none). None: no rotary embedding.
    until : int, optional
        Fill in layers below this one only; by default all L.

    Raises
    ------
    ValueError, TypeError
        One sentence naming the argument, what was expected and what came; nothing is written then.

    Notes
    -----
    The normalised row is rounded once to the dtype of the weights, everything after it is float32 and rounded once
    more on its way into the cache. A row's result has the same bits in any batch and with any number of threads. After
    CALM's state propagation (Schuster et al. 2022, section 3.2).

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.ops import KVCache, KVLayer, KVStack
    >>> layers = [KVLayer(torch.randn(2, 16, 64), torch.randn(2, 16, 64), norm_weight=torch.ones(64)) for _ in range(3)]
    >>> keys, values = ([torch.zeros(4, 2, 8, 16) for _ in range(3)] for _ in range(2))
    >>> exeunt.ops.kv_fill(torch.randn(1, 64), torch.tensor([1]), torch.tensor([3]), torch.tensor([5]),
    ...                    KVStack(layers, norm="rms"), KVCache(keys, values))
    >>> [bool(k[3, :, 5].any()) for k in keys]
    [False, True, True]
    """
    until = len(stack) if until is None else until
    _check(hidden, from_layer, rows, slots, stack, cache, until)
    places = _places(from_layer, rows, slots, cache, until)
    tables, size = _rotary_by_layer(rotary, hidden.shape[0], stack)
    if not places:
        return
    cpu = _backend.cpu
    if cpu is None or hidden.device.type != "cpu":
        from exeunt import reference

        _backend.warn_fallback("kv_fill", hidden.device)
        reference.kv_fill(hidden, from_layer, rows, slots, stack, cache, rotary=rotary, until=until)
        return
    held: dict[int, Tensor] = {}  # float32 copies of the tables, by the ids of what the caller keeps
    addresses = [0 if t is None else _address(t, held) for pair in tables for t in pair or (None, None)]
    from_list, source, row_list, slot_list = zip(*places, strict=True)
    threads, code = torch.get_num_threads(), _backend.DTYPES[stack.dtype]
    need = cpu.kv_fill_workspace(code, len(places), stack.width, until - from_list[0], stack.head_size, threads)
    space = torch.empty(need + 63, dtype=torch.uint8)
    cpu.kv_fill(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), stack.width, stack.heads, stack.head_size,
        size, source, from_list, row_list, slot_list, code, _backend.NORMS[stack.norm], stack.eps,
        _backend.NORMS[stack.key_norm], stack.key_eps, stack.shift, stack.interleaved, stack.table.data_ptr(),
        cache.table.data_ptr(), addresses, until, (space.data_ptr() + 63) & ~63, threads,
    )  # fmt: skip


def _address(table: Tensor, held: dict[int, Tensor]) -> int:
    if table.dtype == torch.float32 and table.is_contiguous():
        return table.data_ptr()
    if id(table) not in held:
        held[id(table)] = table.float().contiguous()
    return held[id(table)].data_ptr()


def _rotary_by_layer(
    rotary: Rotary | Sequence[Rotary | None] | None, count: int, stack: KVStack
) -> tuple[Sequence[Rotary | None], int]:
    """Tables of each layer (nothing where none has any), and R."""
    if rotary is None:
        return (), 0
    if len(rotary) == 2 and isinstance(rotary[0], Tensor):
        rotary = [rotary] * len(stack)  # type: ignore[list-item]
    if len(rotary) != len(stack):
        raise ValueError(f"kv_fill: rotary must be one (cos, sin) or one for each of {len(stack)}, got {len(rotary)}")
    checked, size = None, 0
    for pair in rotary:
        if pair is None or pair is checked:
            continue
        size = size or (pair[0].shape[-1] if pair[0].dim() else 0)
        for name, t in zip(("cos", "sin"), pair, strict=True):
            if t.shape != (count, size) or not 0 < size <= stack.head_size or size % 2:
                raise ValueError(
                    f"kv_fill: {name} must have shape [{count}, R] with one even R up to {stack.head_size}, "
                    f"got {[*t.shape]}"
                )
        checked = pair
    return rotary, size  # type: ignore[return-value]


def _check(
    hidden: Tensor, from_layer: Tensor, rows: Tensor, slots: Tensor, stack: KVStack, cache: KVCache, until: int
) -> None:
    """Raise unless there is one hidden row a place, and a cache that fits the stack."""
    if hidden.dim() != 2 or hidden.shape[1] != stack.width:
        raise ValueError(f"kv_fill: hidden must have shape [N, {stack.width}], got {[*hidden.shape]}")
    if hidden.dtype not in _backend.DTYPES or hidden.device != stack.device:
        kinds = "float32, bfloat16 or float16"
        raise TypeError(
            f"kv_fill: hidden must be {kinds} on {stack.device} like the stack, got {hidden.dtype} on {hidden.device}"
        )
    if hidden.stride(1) != 1 and hidden.numel():
        raise ValueError(f"kv_fill: hidden must have unit stride along D, got {[*hidden.stride()]}")
    count, layers = hidden.shape[0], len(stack)
    if not 0 <= until <= layers:
        raise ValueError(f"kv_fill: until must lie in 0..{layers}, got {until}")
    for name, t in (("from_layer", from_layer), ("rows", rows), ("slots", slots)):
        if t.shape != (count,) or t.dtype != torch.int64:
            raise ValueError(f"kv_fill: {name} must be [{count}] int64, got {[*t.shape]} {t.dtype}")
    wanted = layers, stack.heads, stack.head_size, stack.dtype, stack.device
    if (len(cache), cache.heads, cache.head_size, cache.dtype, cache.device) != wanted:
        raise ValueError(
            f"kv_fill: expected a cache that fits {stack} on {stack.device}, got {cache} on {cache.device}"
        )


def _places(
    from_layer: Tensor, rows: Tensor, slots: Tensor, cache: KVCache, until: int
) -> list[tuple[int, int, int, int]]:
    """(first layer, row of hidden, row, slot) sorted, without padding and without what skipped nothing below until."""
    first = from_layer.tolist()
    if first and (min(first) < 0 or max(first) > len(cache)):
        raise ValueError(f"kv_fill: from_layer must lie in 0..{len(cache)}, got {first}")
    found = enumerate(zip(first, rows.tolist(), slots.tolist(), strict=True))
    places = sorted((layer, n, row, slot) for n, (layer, row, slot) in found if slot >= 0 and layer < until)
    if len({place[2:] for place in places}) < len(places):
        raise ValueError("kv_fill: expected each (row, slot) of the cache at most once, got one of them twice")
    room = min(cache.capacities[places[0][0] : until]) if places else 0
    for _, _, row, slot in places:
        if not (0 <= row < cache.batch and slot < room):
            raise ValueError(
                f"kv_fill: expected places within a cache of {cache.batch} rows by {room} slots, "
                f"got row {row}, slot {slot}"
            )
    return places
