"""The registered attention implementation ``"exeunt"``: stock layers attend through ``ragged_attention``.

A stock model makes one mask for all its layers and hands it to each. Here the mask is a range of keys for each row, not
a tensor over keys::

    [B, 1, 1, 2]   first key, one past the last key: rows in the order of the batch, padded on the left (or right, where
                   all tokens see each other)
    [n, 1, 1, 3]   row of the cache, first key, one past the last key: rows and tokens that run apart from the batch
    None           all keys, as ever

Integers, so that nobody takes it for a mask of the other kinds: int64 where a token sees none after it, int32 where
all see each other (some layers say ``is_causal`` for the masks that they know alone). A sliding window is part of the
range where one token attends; where several do and their windows differ, and for prompts of more than a few tokens,
the mask is that of stock transformers and attention is torch's own: scaled_dot_product_attention.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor

from exeunt import ops, reference
from exeunt.ops import _backend

__all__ = ["NAME", "attend_apart", "counted", "counting", "is_ranges", "register_attention", "spelled_out"]

NAME = "exeunt"
FEW = 16  # queries of a row: beyond it torch's flash attention has products of full height


class _Counting(threading.local):
    """Where calls on this thread are counted."""

    here: Counter[str] | None = None


_counting = _Counting()


def counting(counter: Counter[str] | None) -> None:
    """Count this thread's calls, by what served them, in ``counter`` from now on; None: nowhere.

    Examples
    --------
    >>> import torch
    >>> from collections import Counter
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import register_attention
    >>> from exeunt.models.attention import counting
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, attn_implementation=register_attention())).eval()
    >>> calls = Counter()
    >>> counting(calls)
    >>> with torch.no_grad():
    ...     out = model(torch.tensor([[3, 5, 7]]))
    >>> counting(None)
    >>> calls.total()  # one a layer
    4
    """
    _counting.here = counter


@contextmanager
def counted(counter: Counter[str]) -> Iterator[None]:
    """Count this thread's calls in ``counter`` inside of the block, as :func:`counting` does, and not elsewhere.

    Examples
    --------
    >>> import torch
    >>> from collections import Counter
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import register_attention
    >>> from exeunt.models.attention import counted
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, attn_implementation=register_attention()))
    >>> calls = Counter()
    >>> with counted(calls):
    ...     out = model(torch.tensor([[3, 5, 7]]))
    >>> calls
    Counter({'torch: gradients': 4})
    """
    before, _counting.here = _counting.here, counter
    try:
        yield
    finally:
        _counting.here = before


def register_attention() -> str:
    """Make ``attn_implementation="exeunt"`` known to transformers.

    With it, decoding steps and chunks of up to 16 tokens attend through :func:`exeunt.ops.ragged_attention`: rows of
    different lengths without padding or a mask tensor, and under :func:`exeunt.attach` rows that left are passed over
    without copying the others' keys. Longer prompts, training, masks of other forms and a GPU for which this build has
    no kernel take torch's ``scaled_dot_product_attention``. Call it before the model is made; ``attach`` calls it too.

    Returns
    -------
    str
        The name, ``"exeunt"``.

    Raises
    ------
    ImportError
        Without transformers.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, attn_implementation=exeunt.register_attention())
    >>> LlamaForCausalLM(config).config._attn_implementation
    'exeunt'
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as missing:
        raise ImportError("register_attention needs transformers: pip install exeunt[hf]") from missing
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


# ---- masks


def is_ranges(mask: Any) -> TypeGuard[Tensor]:
    """Whether a layer's mask is a range of keys for each row.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.attention import is_ranges
    >>> is_ranges(torch.tensor([0, 5])[None, None, None]), is_ranges(torch.ones(1, 1, 1, 5, dtype=torch.bool))
    (True, False)
    """
    return isinstance(mask, Tensor) and mask.dtype in (torch.int64, torch.int32)


def spelled_out(ranges: Tensor, keys: int, count: int = 1) -> Tensor:
    """[B, 1, count or 1, keys] bool of what each row's last ``count`` tokens see, True is seen.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.attention import spelled_out
    >>> spelled_out(torch.tensor([1, 4])[None, None, None], keys=5).int()  # keys 1 to 3 of five
    tensor([[[[0, 1, 1, 1, 0]]]], dtype=torch.int32)
    """
    at = torch.arange(keys, device=ranges.device)
    seen = (at >= ranges[..., -2:-1]) & (at < ranges[..., -1:])
    if ranges.dtype == torch.int64 and count > 1:
        seen = seen & (at <= ranges[..., -1:] - torch.arange(count, 0, -1, device=ranges.device)[:, None])
    return seen


def attend_apart(mask: Any, rows: Tensor, ends: Tensor, seen: Tensor) -> Tensor | None:
    """The mask for tokens that attend to rows of the cache as it lies.

    Parameters
    ----------
    mask : Tensor or None
        Their own masks, one of the forms of this module, for the last ``seen`` keys of each.
    rows : Tensor
        [n] int64 rows of the cache.
    ends : Tensor
        [n] int64, one past each token's own place.
    seen : Tensor
        [n] int64 keys that each token's mask is for.

    Returns
    -------
    Tensor or None
        [n, 1, 1, 3] int64; None if the mask is of another form.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.attention import attend_apart
    >>> rows, ends = torch.tensor([0, 2]), torch.tensor([6, 6])
    >>> attend_apart(None, rows, ends, seen=torch.tensor([6, 4])).tolist()
    [[[[0, 0, 6]]], [[[2, 2, 6]]]]
    """
    if mask is None:
        starts = ends - seen
    elif is_ranges(mask):
        starts = mask[:, 0, 0, -2] + (ends - seen)
    else:
        return None
    return torch.stack((rows, starts, ends), -1)[:, None, None]


def _mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: Any = None,
    cache_position: Tensor | None = None,  # transformers 4.57 in the place of q_length and q_offset
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers asks of a mask interface."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    if cache_position is not None:
        placed: dict[str, Any] = {"cache_position": cache_position}
        q_length, q_offset = len(cache_position), cache_position[0]
    else:
        placed = {"q_length": q_length, "q_offset": 0 if q_offset is None else q_offset}
    assert q_length is not None
    kind, own = _kind(mask_function), _own_attention(config)
    if kind is not None and q_length <= FEW and not own and not torch.compiler.is_compiling():
        end = kv_length if kind == "bidirectional" else int(placed.get("q_offset", q_offset)) + q_length - kv_offset
        first, last = _padding(attention_mask, kv_offset, end, batch_size)
        start = 0 if kind == "bidirectional" else max(end - (kwargs.get("local_size") or end), 0)
        if first is None and end == kv_length and start == 0:
            return None
        if first is None:  # a window, or a cache that is longer than what is in it
            first, last = torch.tensor([[0], [end]], device=kwargs.get("device")).expand(2, batch_size)
        one = start == 0 or q_length == 1  # several tokens have windows that differ
        if one and last is not None and (kind == "bidirectional" or bool((last == end).all())):
            first = first.clamp_min(start)
            ranges = torch.stack((first, last), -1)[:, None, None]
            return ranges if kind == "causal" else ranges.int()
    stock: Any = eager_mask if own else sdpa_mask
    return stock(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, **placed, **kwargs,
    )  # fmt: skip


def _own_attention(config: Any) -> bool:
    """Whether a model makes a mask for any attention that is chosen, and then attends in a way of its own.

    Those that ask for implementations by name have the table of them among the names of their module.
    """
    modeling = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    return modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def _kind(mask_function: Any) -> str | None:
    """``causal`` (with or without a window), ``bidirectional``, or None for other patterns."""
    from transformers import masking_utils as stock

    if mask_function is stock.causal_mask_function:
        return "causal"
    if mask_function is getattr(stock, "bidirectional_mask_function", stock):
        return "bidirectional"
    joined = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if len(joined) == 1 and isinstance(joined[0], tuple) and len(joined[0]) == 2:
        names = {getattr(f, "__qualname__", "").split(".")[0] for f in joined[0]}
        if stock.causal_mask_function in joined[0] and "sliding_window_overlay" in names:
            return "causal"
    return None


def _padding(mask: Tensor | None, offset: int, end: int, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """First key and one past the last key [B] that a padding mask [B, K] bool lets each row see, from ``offset`` on.

    Without padding (None, None), and (first, None) where what a row sees is not one range. Waits for the device.
    """
    seen = None if mask is None else mask[:, offset : offset + end]
    if seen is None or (seen.shape == (batch, end) and bool(seen.all())):
        return None, None
    first = seen.int().argmax(-1)
    last = seen.shape[1] - seen.flip(-1).int().argmax(-1)
    whole = seen.shape == (batch, end) and bool(((last - first == seen.sum(-1)) & seen.any(-1)).all())
    return first, last if whole else None


# ---- attention


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention implementation: [B, q, Hq, Dv] of ``query`` [B, Hq, q, Dh]."""
    if attention_mask is not None and not is_ranges(attention_mask):  # StableLM's of 5.0 has a column too many
        attention_mask = attention_mask[..., : key.shape[2]]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reason = _unable(query, key, value, attention_mask, dropout, kwargs)
    if _counting.here is not None:
        _counting.here["ragged_attention" if reason is None else f"torch: {reason}"] += 1
    if reason is None:
        attention = ops.ragged_attention
    elif kwargs.get("softcap") is None:
        return _by_torch(module, query, key, value, attention_mask, causal, dropout=dropout, scaling=scaling, **kwargs)
    elif dropout or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            f"attention: expected neither dropout nor sinks beside softcap, got dropout={dropout}"
        )
    else:  # which torch's attention has not
        attention = reference.ragged_attention
    batch, heads, count, _ = query.shape
    device, length = query.device, key.shape[2]
    if count > FEW and attention_mask is None and causal:
        length = count  # a prompt, which may be for a cache with more room
    rows, starts, ends = torch.arange(batch, device=device), None, torch.full((batch,), length, device=device)
    bias = kwargs.get("position_bias")
    if is_ranges(attention_mask):
        ranges = attention_mask[:, 0, 0]
        rows = ranges[:, 0] if ranges.shape[1] == 3 else rows
        starts, ends, causal = ranges[:, -2], ranges[:, -1], ranges.dtype == torch.int64
    elif attention_mask is not None:
        if not attention_mask.is_floating_point():
            attention_mask = query.new_zeros(()).masked_fill(~attention_mask, -torch.inf)
        bias, causal = attention_mask if bias is None else attention_mask + bias, False
    if bias is not None:
        bias = bias.expand(batch, heads, count, -1).transpose(1, 2).flatten(0, 1)
    out = attention(
        query.transpose(1, 2).flatten(0, 1), key, value, torch.arange(0, batch * count + 1, count, device=device),
        rows, ends, kv_start=starts, causal=causal, softcap=kwargs.get("softcap"), scale=scaling, bias=bias,
    )  # fmt: skip
    return out.view(batch, count, heads, -1), None


def _by_torch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, **kwargs: Any
) -> tuple[Tensor, None]:  # fmt: skip
    """The same by torch's ``scaled_dot_product_attention``, where ranges and sinks have to be a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    count, sinks = query.shape[2], kwargs.get("s_aux")
    if mask is None and causal:
        end = count if count > FEW else key.shape[2]  # a prompt may be for a cache with more room
        if 1 < count < end or sinks is not None:  # torch takes several queries without a mask for a prompt
            mask = torch.tensor([0, end], device=query.device)[None, None, None]
    if is_ranges(mask):
        if mask.shape[-1] == 3:  # rows of the cache as it lies
            key, value = (t.index_select(0, mask[:, 0, 0, 0]) for t in (key, value))
        mask = spelled_out(mask, key.shape[2], count)
    if sinks is not None:  # one more key with the sink's logit and without a value: it takes its share, gives nothing
        if mask is None or mask.dtype == torch.bool:
            hidden = query.new_zeros(1, 1, 1, key.shape[2])
            mask = hidden if mask is None else hidden.masked_fill(~mask, -torch.inf)
        sink = sinks.to(mask.dtype).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        mask = torch.cat((mask.expand(*query.shape[:3], -1), sink), -1)
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (key, value))
    causal = causal and mask is None and count > 1
    return sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **kwargs)


def _unable(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why a call is not ``ragged_attention``'s, if it is not."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients"
    if dropout or kwargs.get("s_aux") is not None:
        return "dropout or attention sinks"
    if kwargs.get("softcap") is None:
        if query.shape[2] > FEW:
            return "more than a few queries"
        if mask is not None and not is_ranges(mask):
            return "a mask that is not one range of keys"
    widest = max(query.shape[3], value.shape[3])
    here = query.is_cpu or (query.is_cuda and widest <= getattr(_backend.cuda, "largest_head", 0))
    same = query.dtype == key.dtype == value.dtype  # not under autocast
    if not here or not same or query.dtype not in ops.DTYPES or torch.compiler.is_compiling():
        return "device, dtype or compilation"
    return None
