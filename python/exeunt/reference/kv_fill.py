"""kv_fill in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exeunt.reference.exit_stats import normalised


@torch.no_grad()
def kv_fill(
    hidden: Tensor,
    from_layer: Tensor,
    rows: Tensor,
    slots: Tensor,
    stack: Any,
    keys: Any,
    values: Any,
    *,
    rotary: Any = None,
    until: int | None = None,
) -> None:
    """Specification of :func:`exeunt.ops.kv_fill`: float64 if ``hidden`` is float64, float32 otherwise.

    Keys and values may be wider than the stack's dtype; they then show what is lost by rounding to it.

    Examples
    --------
    >>> import torch, exeunt
    >>> layer = exeunt.ops.KVLayer(torch.eye(4).view(1, 4, 4), 2 * torch.eye(4).view(1, 4, 4))
    >>> keys, values = [torch.zeros(1, 1, 2, 4)], [torch.zeros(1, 1, 2, 4)]
    >>> place = torch.tensor([0]), torch.tensor([0]), torch.tensor([1])
    >>> exeunt.reference.kv_fill(torch.ones(1, 4), *place, exeunt.ops.KVStack([layer]), keys, values)
    >>> keys[0][0, 0].tolist(), values[0][0, 0, 1].tolist()
    ([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [2.0, 2.0, 2.0, 2.0])
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    one_pair = rotary is not None and isinstance(rotary[0], Tensor)
    for index, layer in enumerate(stack.layers[:until]):
        chosen = ((from_layer <= index) & (slots >= 0)).nonzero().flatten()
        if not len(chosen):
            continue
        pair = rotary if one_pair or rotary is None else rotary[index]

        def shifted(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(dtype) + stack.shift

        x = hidden[chosen].to(dtype)
        x = normalised(x, stack.norm, shifted(layer.norm_weight), layer.norm_bias, stack.eps, stack.dtype)

        def project(weight: Tensor, bias: Tensor | None, x: Tensor = x) -> Tensor:
            out = torch.einsum("nd,hkd->nhk", x, weight.to(dtype))
            return out if bias is None else out + bias.to(dtype)

        key, value = project(layer.key, layer.key_bias), project(layer.value, layer.value_bias)
        if stack.key_norm is not None:
            key = normalised(key, stack.key_norm, shifted(layer.key_norm), None, stack.key_eps, dtype)
        if pair is not None:
            cos, sin = (t[chosen].to(dtype)[:, None] for t in pair)
            key = _rotated(key, cos, sin, stack.interleaved)
        place = rows[chosen], slots[chosen]
        keys[index].transpose(1, 2)[place] = key.to(keys[index].dtype)
        values[index].transpose(1, 2)[place] = value.to(values[index].dtype)


def _rotated(key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        partner = torch.cat((-b, a), -1)
    return torch.cat((turned * cos + partner * sin, rest), -1)
