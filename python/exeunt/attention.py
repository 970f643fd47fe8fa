"""``attn_implementation="exeunt"``: stock transformers models attend by :func:`exeunt.ops.ragged_attention`.

The mask function makes no [B, 1, Q, K] tensor where a row's keys are a range, which they are nearly always (causal,
left padding, sliding windows, encoders with right padding): it hands the layers :data:`FIELDS` integers a row. What is
no range, and what the op does not do, goes to torch's scaled_dot_product_attention with the stock mask, and is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from exeunt.ops import _backend
from exeunt.ops.ragged_attention import ragged_attention

__all__ = ["NAME", "register_attention", "served"]

NAME = "exeunt"

#: How many attention calls ran as what: "ragged_attention", or "sdpa: " and the reason. Yours to clear.
served: Counter[str] = Counter()

#: Of a row: its keys' range, the position of its first query among them, the window (0: none), whether causal. Such
#: ranges are int64 [B, 1, 1, 5], so that what picks rows out of a mask [B, 1, Q, K] picks rows out of them.
FIELDS = 5

#: What a layer may pass that the op does not do, and what stock attention makes of it.
_FOREIGN = ("s_aux", "position_bias", "head_mask", "cache")


def register_attention() -> None:
    """Make ``attn_implementation="exeunt"`` known to transformers; :func:`exeunt.attach` does so too.

    Afterwards a model takes it by ``from_pretrained(..., attn_implementation="exeunt")`` or
    ``model.set_attn_implementation("exeunt")``, with exits or without.

    Notes
    -----
    On a CPU, in inference, without dropout, attention weights asked for or masks that are no range of keys a row;
    everything else runs as ``"sdpa"`` would. ``exeunt.attention.served`` counts both.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> exeunt.register_attention()
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...                      vocab_size=50)
    >>> model = LlamaForCausalLM(config).eval()
    >>> model.set_attn_implementation("exeunt")
    >>> exeunt.attention.served.clear()
    >>> with torch.no_grad():
    ...     logits = model(torch.arange(5)[None]).logits
    >>> exeunt.attention.served
    Counter({'ragged_attention': 1})
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ranges_of)


# ---- masks ----------------------------------------------------------------------------------------------------------


def ranges_of(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """Ranges of keys [B, 1, 1, FIELDS]; the stock mask where there are none. Called by transformers, which names these.

    Examples
    --------
    >>> from transformers.masking_utils import causal_mask_function
    >>> left_padded = torch.tensor([[False, True, True], [True, True, True]])
    >>> ranges_of(2, 1, 3, 2, 0, causal_mask_function, left_padded).flatten(1)
    tensor([[1, 3, 2, 0, 1],
            [0, 3, 2, 0, 1]])
    """
    given = dict(options, batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
                 attention_mask=attention_mask)  # fmt: skip
    if cache_position is not None:  # transformers before 5.4
        given["cache_position"] = cache_position
    else:
        given.update(q_length=q_length, q_offset=q_offset)
    kind = None if torch.compiler.is_compiling() else _kind(mask_function)
    if kind is not None:
        causal, window = kind
        if cache_position is not None:
            q_length, q_offset = len(cache_position), int(cache_position[0])
        first = int(q_offset) - int(kv_offset)  # of the queries, among these keys
        stop = first + q_length if causal else kv_length  # type: ignore[operator]
        if first >= 0 and stop <= kv_length:
            rows = _rows(attention_mask, batch_size, int(kv_offset), stop)
            if rows is not None:
                facts = torch.tensor([first, window, int(causal)]).expand(batch_size, 3)
                return torch.cat((rows, facts), 1)[:, None, None]
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**given)


def _kind(mask_function: Any) -> tuple[bool, int] | None:
    """(causal, window) of a stock mask function, None for any other."""
    from transformers import masking_utils as stock

    if mask_function is stock.causal_mask_function:
        return True, 0
    if mask_function is getattr(stock, "bidirectional_mask_function", stock):
        return False, 0
    # A sliding window is a closure over two others: the overlay, itself a closure over its width, and the causal one.
    if _code(mask_function) is not _code(stock.and_masks(stock.causal_mask_function)):
        return None
    parts = mask_function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not stock.causal_mask_function:
        return None
    if _code(parts[0]) is not _code(stock.sliding_window_overlay(1)):
        return None
    return True, int(parts[0].__closure__[0].cell_contents)


def _code(function: Any) -> Any:
    return getattr(function, "__code__", function)


def _rows(padding: Tensor | None, batch: int, offset: int, stop: int) -> Tensor | None:
    """[B, 2] first key and end of each row, as a padding mask [B, offset + K] leaves them; None if that is no range."""
    if padding is None:
        return torch.tensor([[0, stop]]).expand(batch, 2)
    held = padding[:, offset : offset + stop].bool()
    if held.shape[1] < stop:
        return None
    count = held.sum(1)
    start = held.int().argmax(1)
    last = stop - held.flip(1).int().argmax(1)
    if not bool(((last - start == count) | (count == 0)).all()):
        return None
    return torch.stack((start, start + count), 1)


def _dense(ranges: Tensor, queries: int, keys: int) -> Tensor:
    """The boolean mask [B, 1, Q, K] that ranges stand for."""
    start, stop, first, window, causal = (t[:, None, None, None] for t in ranges.flatten(1).unbind(1))
    k = torch.arange(keys)
    distance = first + torch.arange(queries)[:, None] - k
    seen = (k >= start) & (k < stop) & ((distance >= 0) | (causal == 0))
    return seen & ((window == 0) | (distance < window))


# ---- attention ------------------------------------------------------------------------------------------------------


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention [B, Q, Hq, Dv] of a layer: query [B, Hq, Q, Dh], key and value [B, Hkv, K, Dh]. Called by transformers.

    Examples
    --------
    >>> states = torch.zeros(1, 2, 3, 4)
    >>> attend(torch.nn.Module(), states, states, states, None)[0].shape
    torch.Size([1, 3, 2, 4])
    """
    ranged = attention_mask is not None and attention_mask.shape[-1] == FIELDS and attention_mask.dtype == torch.int64
    reason = _unserved(module, query, attention_mask, ranged, dropout, options)
    if reason is not None:
        served[f"sdpa: {reason}"] += 1
        if ranged:
            attention_mask = _dense(attention_mask, query.shape[2], key.shape[2])  # type: ignore[arg-type]
        if softcap is not None:
            return _capped(module, query, key, value, attention_mask, dropout, scaling, softcap, is_causal)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, **options)  # fmt: skip
    served["ragged_attention"] += 1
    batch, heads, queries, size = query.shape
    if ranged:
        start, stop, positions, window, causal = _lists(attention_mask, queries)  # type: ignore[arg-type]
    else:  # as stock attention reads no mask at all
        start, positions, window = None, None, 0
        causal = queries > 1 and getattr(module, "is_causal", True) if is_causal is None else is_causal
        stop = torch.full((batch,), key.shape[2])
        if causal:  # the queries stand at 0, 1, ... then, whatever the number of keys
            positions = torch.arange(queries).repeat(batch)
    out = ragged_attention(
        query.transpose(1, 2).reshape(batch * queries, heads, size), key, value, torch.arange(batch + 1) * queries,
        torch.arange(batch), stop, kv_start=start, positions=positions, causal=causal, window=window or None,
        softcap=softcap, scale=scaling,
    )  # fmt: skip
    return out.view(batch, queries, heads, -1), None


def _unserved(
    module: Any, query: Tensor, mask: Tensor | None, ranged: bool, dropout: float, options: dict[str, Any]
) -> str | None:
    """Why stock attention is to serve this call, if it is."""
    if mask is not None and not ranged:
        return "a mask that is no range of keys a row"
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        return "training"
    if not query.is_cpu or query.dtype not in _backend.DTYPES:
        return f"{query.dtype} on {query.device.type}"
    if options.get("output_attentions"):
        return "output_attentions"
    return next((name for name in _FOREIGN if options.get(name) is not None), None)


_last: tuple[Any, ...] = (None, 0, None)  # the ranges that were read last, for how many queries, and what they said


def _lists(ranges: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor | None, int, bool]:
    """What the op wants of ranges: first keys, ends, positions, window, causal. All layers of a step share them."""
    global _last
    kept, count, found = _last
    if kept is ranges and count == queries:
        return found
    flat = ranges.flatten(1)
    start, stop = flat[:, 0].contiguous(), flat[:, 1].contiguous()
    first, window, causal = flat[0, 2:].tolist() if len(flat) else (0, 0, 1)
    positions = None
    if causal and not bool((stop == first + queries).all()):  # right padding: the queries are not the last keys
        positions = (first + torch.arange(queries)).repeat(len(flat))
    found = start, stop, positions, window, bool(causal)
    _last = ranges, queries, found
    return found


def _capped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None, softcap: float, is_causal: bool | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with a bound on its scores, in plain torch: scaled_dot_product_attention has none."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    score = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    score = softcap * torch.tanh(score / softcap)
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    elif mask is not None:
        score = score + mask
    weight = torch.nn.functional.dropout(score.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weight @ value).transpose(1, 2).contiguous(), None
