"""kv_fill: keys and values of the layers that rows skipped, written to the cache in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    A paged cache [P, Hkv, page, Dh] is one of P rows: ``rows`` names pages, ``slots`` places in them.

    On CUDA nothing waits for the device, so a captured graph follows first layers and places; ones that lie outside
    cannot be refused then, and such rows are left out.

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
    count = hidden.shape[0]
    pairs, size = _rotary_by_layer(rotary, count, stack)
    kernel = stack.kernel
    if kernel is None:
        _refer(hidden, from_layer, rows, slots, stack, cache, rotary, until)
        return
    addresses, code, held = _addresses(pairs)
    index = [t if t.is_contiguous() else t.contiguous() for t in (from_layer, rows, slots)]
    place = _backend.place(hidden.device)
    if hidden.is_cuda:
        space = torch.empty(kernel.workspace(count), dtype=torch.uint8, device=hidden.device)
    else:
        space = _backend.scratch(kernel.workspace(count, *place))
    places, capacities = cache.addresses
    kernel.fill(
        hidden.data_ptr(), _backend.DTYPES[hidden.dtype], hidden.stride(0),
        (index[0].data_ptr(), index[1].data_ptr(), index[2].data_ptr(), count, until, cache.batch, capacities),
        places, addresses, code, size, space.data_ptr(), *place,
    )  # fmt: skip
    del held  # copies of tables, which the kernel has read now, or will have before their memory is used again


def _refer(
    hidden: Tensor, from_layer: Tensor, rows: Tensor, slots: Tensor, stack: KVStack, cache: KVCache, rotary: Any,
    until: int,
) -> None:  # fmt: skip
    """The reference, with the places checked as the kernel checks them."""
    from exeunt import reference

    _backend.warn_fallback("kv_fill", hidden.device)
    if _backend.cpu is not None:
        index = [t.cpu().contiguous() for t in (from_layer, rows, slots)]
        listed = (*(t.data_ptr() for t in index), len(hidden), until, cache.batch, cache.addresses[1])
        _backend.cpu.kv_fill_check(listed, len(stack))
    reference.kv_fill(hidden, from_layer, rows, slots, stack, cache, rotary=rotary, until=until)


def _addresses(pairs: Sequence[Rotary | None]) -> tuple[list[int], int, list[Tensor]]:
    """Addresses of the tables, their dtype's code, and what must live until they have been read."""
    if len(pairs) == 1 and pairs[0] is not None:  # nearly always, and as the kernel takes them
        cos, sin = pairs[0]
        if cos.dtype == sin.dtype and cos.dtype in _backend.DTYPES and cos.is_contiguous() and sin.is_contiguous():
            return [cos.data_ptr(), sin.data_ptr()], _backend.DTYPES[cos.dtype], []
    dtypes = {table.dtype for pair in pairs if pair is not None for table in pair}
    if not dtypes:
        return [], 0, []
    dtype = dtypes.pop()
    if dtypes or dtype not in _backend.DTYPES:
        dtype = torch.float32
    made: dict[int, Tensor] = {}  # by the ids of what the caller keeps
    addresses = []
    for pair in pairs:
        for table in pair or (None, None):
            if table is not None and not (table.dtype == dtype and table.is_contiguous()):
                if id(table) not in made:
                    made[id(table)] = table.to(dtype).contiguous()
                table = made[id(table)]
            addresses.append(0 if table is None else table.data_ptr())
    return addresses, _backend.DTYPES[dtype], list(made.values())


def _rotary_by_layer(
    rotary: Rotary | Sequence[Rotary | None] | None, count: int, stack: KVStack
) -> tuple[Sequence[Rotary | None], int]:
    """Tables of each layer, or one pair for all of them, or none; and R."""
    if rotary is None:
        return (), 0
    if len(rotary) == 2 and isinstance(rotary[0], Tensor):
        rotary = (rotary,)  # type: ignore[assignment]
    elif len(rotary) != len(stack):
        raise ValueError(f"kv_fill: rotary must be one (cos, sin) or one for each of {len(stack)}, got {len(rotary)}")
    checked, size = None, 0
    for pair in rotary:
        if pair is None or pair is checked:
            continue
        size = size or (pair[0].shape[-1] if pair[0].dim() else 0)
        for name, t in zip(("cos", "sin"), pair, strict=True):
            if t.device != stack.device:
                raise ValueError(f"kv_fill: {name} must be on {stack.device} like the stack, got {t.device}")
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
        if t.device != stack.device:
            raise ValueError(f"kv_fill: {name} must be on {stack.device} like the stack, got {t.device}")
    if stack.stale:
        raise ValueError("kv_fill: expected projections as they were when packed, got some that were changed in place")
    if cache.kind != stack.kind:
        raise ValueError(
            f"kv_fill: expected a cache that fits {stack} on {stack.device}, got {cache} on {cache.device}"
        )
