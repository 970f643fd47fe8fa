"""kv_fill: keys and values of the layers that rows skipped, written to the cache in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.ops import _backend
from exeunt.ops.kv_stack import KVStack

__all__ = ["kv_fill"]

Rotary = tuple[Tensor, Tensor]


@torch.no_grad()
def kv_fill(
    hidden: Tensor,
    from_layer: Tensor,
    rows: Tensor,
    slots: Tensor,
    stack: KVStack,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    rotary: Rotary | Sequence[Rotary | None] | None = None,
    until: int | None = None,
) -> None:
    """Write the keys and values that skipped layers owe the cache.

    For every row n and every layer l with ``from_layer[n] <= l < until``: x = norm_l(hidden[n]); its keys are
    rope(key_norm(Wk x + bk)), its values Wv x + bv, written to ``keys[l][rows[n], :, slots[n]]`` and ``values[l]``. All
    skipped layers see the same hidden state, so its statistics are taken once, and all their weights are read in one
    pass, once for all rows.

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
    keys, values : sequence of Tensor
        One a layer, [B, Hkv, S, Dh] of the stack's dtype with unit stride along Dh, written in place. Capacities S may
        differ.
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
    >>> from exeunt.ops import KVLayer, KVStack
    >>> layers = [KVLayer(torch.randn(2, 16, 64), torch.randn(2, 16, 64), norm_weight=torch.ones(64)) for _ in range(3)]
    >>> keys, values = ([torch.zeros(4, 2, 8, 16) for _ in range(3)] for _ in range(2))
    >>> exeunt.ops.kv_fill(torch.randn(1, 64), torch.tensor([1]), torch.tensor([3]), torch.tensor([5]),
    ...                    KVStack(layers, norm="rms"), keys, values)
    >>> [bool(k[3, :, 5].any()) for k in keys]
    [False, True, True]
    """
    until = len(stack) if until is None else until
    tables = _rotary_by_layer(rotary, len(stack))
    _check_rows(hidden, from_layer, rows, slots, stack, keys, values, until)
    places = _places(from_layer, rows, slots, len(stack), until)
    if not places:
        return
    first = places[0][0]
    room, flat = _cache_layers(stack, keys, values, first, until)
    for _, _, row, slot in places:
        if not (0 <= row < room[0] and slot < room[1]):
            raise ValueError(
                f"kv_fill: expected places within a cache of {room[0]} rows by {room[1]} slots, "
                f"got row {row}, slot {slot}"
            )
    size = _rotary_size(tables[first:until], hidden.shape[0], stack.head_size)
    cpu = _backend.cpu
    if cpu is None or hidden.device.type != "cpu":
        from exeunt import reference

        _backend.warn_fallback("kv_fill", hidden.device)
        reference.kv_fill(hidden, from_layer, rows, slots, stack, keys, values, rotary=rotary, until=until)
        return
    held: dict[int, Tensor] = {}  # float32 copies of the tables, by the ids of what the caller keeps
    flat = [0] * (cpu.kv_place_fields * first) + flat
    for layer in range(first, until):
        pair = tables[layer]
        if pair is not None:
            at = cpu.kv_place_fields * (layer + 1)
            flat[at - 2 : at] = _address(pair[0], held), _address(pair[1], held)
    from_list, source, row_list, slot_list = zip(*places, strict=True)
    threads, code = torch.get_num_threads(), _backend.DTYPES[stack.dtype]
    need = cpu.kv_fill_workspace(code, len(places), stack.width, until - first, stack.head_size, threads)
    space = torch.empty(need + 63, dtype=torch.uint8)
    cpu.kv_fill(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0), stack.width, stack.heads, stack.head_size,
        size, source, from_list, row_list, slot_list, code, _backend.NORMS[stack.norm], stack.eps,
        _backend.NORMS[stack.key_norm], stack.key_eps, stack.shift, stack.interleaved, stack.table.data_ptr(), flat,
        until, (space.data_ptr() + 63) & ~63, threads,
    )  # fmt: skip


def _address(table: Tensor, held: dict[int, Tensor]) -> int:
    if id(table) not in held:
        held[id(table)] = table.float().contiguous()
    return held[id(table)].data_ptr()


def _rotary_by_layer(rotary: Rotary | Sequence[Rotary | None] | None, layers: int) -> Sequence[Rotary | None]:
    if rotary is None:
        return [None] * layers
    if len(rotary) == 2 and isinstance(rotary[0], Tensor):
        return [rotary] * layers  # type: ignore[list-item]
    if len(rotary) != layers:
        raise ValueError(
            f"kv_fill: rotary must be one (cos, sin) or one for each of {layers} layers, got {len(rotary)}"
        )
    return rotary  # type: ignore[return-value]


def _check_rows(
    hidden: Tensor,
    from_layer: Tensor,
    rows: Tensor,
    slots: Tensor,
    stack: KVStack,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    until: int,
) -> None:
    """Raise unless there is one hidden row a place, and one cache layer a layer."""
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
    for name, held in (("keys", keys), ("values", values)):
        if len(held) != layers:
            raise ValueError(f"kv_fill: {name} must have one tensor for each of {layers} layers, got {len(held)}")


def _places(
    from_layer: Tensor, rows: Tensor, slots: Tensor, layers: int, until: int
) -> list[tuple[int, int, int, int]]:
    """(first layer, row of hidden, row, slot) sorted, without padding and without what skipped nothing below until."""
    first = from_layer.tolist()
    if first and (min(first) < 0 or max(first) > layers):
        raise ValueError(f"kv_fill: from_layer must lie in 0..{layers}, got {first}")
    found = enumerate(zip(first, rows.tolist(), slots.tolist(), strict=True))
    places = sorted((layer, n, row, slot) for n, (layer, row, slot) in found if slot >= 0 and layer < until)
    if len({place[2:] for place in places}) < len(places):
        raise ValueError("kv_fill: expected each (row, slot) of the cache at most once, got one of them twice")
    return places


def _cache_layers(
    stack: KVStack, keys: Sequence[Tensor], values: Sequence[Tensor], first: int, until: int
) -> tuple[tuple[int, int], list[int]]:
    """Rows and slots that all the layers have; and of each layer the fields of a KvPlace, without rotary tables."""
    heads, size, dtype, device = stack.heads, stack.head_size, stack.dtype, stack.device
    rows, slots, flat = list[int](), list[int](), list[int]()
    for layer in range(first, until):
        pair = keys[layer], values[layer]
        strides = list[int]()
        for name, t in zip(("keys", "values"), pair, strict=True):
            shape, stride = t.shape, t.stride()
            if len(shape) != 4 or shape[1] != heads or shape[3] != size:
                raise ValueError(
                    f"kv_fill: {name} of layer {layer} must have shape [B, {heads}, S, {size}], got {[*shape]}"
                )
            if t.dtype != dtype or t.device != device:
                raise TypeError(
                    f"kv_fill: {name} of layer {layer} must be {dtype} on {device} like the stack, "
                    f"got {t.dtype} on {t.device}"
                )
            if stride[3] != 1:
                raise ValueError(f"kv_fill: {name} of layer {layer} must have unit stride along Dh, got {[*stride]}")
            rows.append(shape[0])
            slots.append(shape[2])
            strides += stride[:3]
        flat += (pair[0].data_ptr(), pair[1].data_ptr(), *strides, 0, 0)
    return (min(rows), min(slots)), flat


def _rotary_size(tables: Sequence[Rotary | None], count: int, head_size: int) -> int:
    """R of all the tables, 0 where there are none."""
    checked, size = None, 0
    for pair in tables:
        if pair is None or pair is checked:
            continue
        size = size or (pair[0].shape[-1] if pair[0].dim() else 0)
        for name, t in zip(("cos", "sin"), pair, strict=True):
            if t.shape != (count, size) or not 0 < size <= head_size or size % 2:
                raise ValueError(
                    f"kv_fill: {name} must have shape [{count}, R] with one even R up to {head_size}, got {[*t.shape]}"
                )
        checked = pair
    return size
