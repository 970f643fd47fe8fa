"""The parameters that make a stock model's keys and values, so that ``kv_fill`` can do what its layers would do.

Names say where to look; what is believed is what gives the stock layer's own keys and values for a few tokens. A model
for which nothing does keeps running its own layers up to their keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exeunt.models.families import CACHE_KEYWORD
from exeunt.models.structure import eps_of, evaluating
from exeunt.ops import DTYPES, KVCache, KVLayer, KVStack, kv_fill
from exeunt.ops._backend import kernels

__all__ = ["KeyValueWeights", "rotary_of"]

_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1", "norm_1", "ln_attn")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv")
_KEY_NORMS = ("k_norm", "k_layernorm")
_TOKENS = 4


def rotary_of(arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Rotary tables among the arguments that a stock model passes to a layer: cos and sin, each [B or 1, T, R].

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import rotary_of
    >>> cos, sin = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    >>> rotary_of({"position_embeddings": (cos, sin)})[0] is cos, rotary_of({"position_ids": torch.arange(4)})
    (True, None)
    """
    pair = arguments.get("position_embeddings")
    return pair if isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair) else None


@dataclass(frozen=True)
class _Facts:
    """What is the same in all layers, and cannot be read off the modules."""

    norm: str | None
    shift: float
    key_norm: str | None
    interleaved: bool
    grouped: bool  # a fused projection holds each head's rows together


@dataclass(frozen=True)
class _Parts:
    """The modules of one layer that its keys and values pass through."""

    norm: Any
    key: Any  # or the fused projection
    value: Any
    key_norm: Any

    @property
    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        return [m for m in (self.norm, self.key, self.value, self.key_norm) if m is not None]


class KeyValueWeights:
    """A :class:`exeunt.ops.KVStack` over a model's own parameters, renewed when they are replaced.

    Attributes
    ----------
    rotates : tuple of bool
        By layer, whether its keys get a rotary embedding.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import discover
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> KeyValueWeights.find(discover(LlamaForCausalLM(config))).current()
    KVStack(3 layers, D=32, Hkv=2, Dh=8, torch.float32)
    """

    def __init__(
        self, layers: tuple[nn.Module, ...], facts: _Facts, rotates: tuple[bool, ...], head: tuple[int, int],
        packed: bool,
    ) -> None:  # fmt: skip
        self.rotates = rotates
        self._layers, self._facts, self._head, self._packed = layers, facts, head, packed
        self._renew()

    @staticmethod
    @torch.no_grad()
    def find(structure: Any, packed: bool = False) -> KeyValueWeights | None:
        """The weights of a model, packed or as they lie; None where no reading of its modules gives the keys and values
        that it computes."""
        model, layers = structure.model, structure.layers
        weight = structure.weight
        if packed and weight.device.type != "cpu":
            raise ValueError(f"attach: Propagate(packed=True) needs a model on cpu, got {weight.device}")
        if getattr(kernels(weight.device), "KvFill", None) is None:
            return None
        if weight.dtype not in DTYPES or len(set(layers)) < len(layers):
            return None
        if getattr(model.config, "is_encoder_decoder", False):
            return None
        parts = [p for p in map(_parts, layers) if p is not None]
        truth = _observe(model, layers, weight.shape[0]) if len(parts) == len(layers) else None
        if truth is None:
            return None
        head = truth[0].keys.shape[1], truth[0].keys.shape[3]
        for facts in _readings(parts[0]):
            rotates = []
            for own, seen in zip(parts, truth, strict=True):
                turned = _agrees(own, seen, facts)
                if turned is None:
                    break
                rotates.append(turned)
            else:
                return KeyValueWeights(layers, facts, tuple(rotates), head, packed)
        return None

    def current(self) -> KVStack | None:
        """The stack as the model is now; None where a module of it is no longer what it was (an adapter, a hook)."""
        same = all(m.get(name) is child for m, name, child in self._children) and all(
            p.get(name) is value and value.data_ptr() == address for p, name, value, address in self._values
        )
        if not same or (self._stack is not None and self._stack.stale):
            self._renew()
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self._modules):
            return None
        return self._stack

    def _renew(self) -> None:
        parts = [p for p in map(_parts, self._layers) if p is not None]
        layers = [built for p in parts if (built := _layer_of(p, self._facts, *self._head)) is not None]
        complete = len(layers) == len(self._layers)
        self._stack = _stack_of(layers, parts, self._facts, self._packed) if complete else None
        self._modules = [m for p in parts for m in p.modules]
        self._values = [(m._parameters, name, p, p.data_ptr())
                        for m in self._modules for name, p in m._parameters.items() if p is not None]  # fmt: skip
        chosen = set(self._modules)
        self._children = [(parent._modules, name, child) for layer in self._layers for parent in layer.modules()
                          for name, child in parent._modules.items() if child in chosen]  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """What a stock layer took and made: hidden [T, D], keys and values [1, Hkv, T, Dh], its rotary tables [T, R]."""

    hidden: Tensor
    keys: Tensor
    values: Tensor
    rotary: tuple[Tensor, Tensor] | None


def _observe(model: Any, layers: tuple[nn.Module, ...], vocabulary: int) -> list[_Seen] | None:
    """Run a few tokens through the stock model."""
    from transformers import DynamicCache

    taken: list[tuple[Tensor, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        taken.append((hidden[0].detach().clone(), rotary_of(kwargs)))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    cache: Any = DynamicCache()
    device = next(model.parameters()).device
    try:
        ids = torch.arange(1, _TOKENS + 1, device=device).remainder(vocabulary)[None]
        with evaluating(model):
            model(input_ids=ids, **{CACHE_KEYWORD: cache}, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    if len(taken) != len(layers) or len(cache.layers) != len(layers):
        return None
    seen = []
    for (hidden, pair), layer in zip(taken, cache.layers, strict=True):
        keys, values = layer.keys, layer.values
        if keys.dim() != 4 or keys.shape[2] != _TOKENS or values.shape != keys.shape:
            return None
        tables = None if pair is None else (pair[0][0], pair[1][0])
        seen.append(_Seen(hidden, keys, values, tables))
    return seen


def _parts(layer: nn.Module) -> _Parts | None:
    """The modules of a layer's own attention; None where they are not plain linear layers."""
    for path, module in layer.named_modules():
        if "encoder" in path or "cross" in path:
            continue
        children = module._modules
        fused = next((children[name] for name in _FUSED if children.get(name) is not None), None)
        key, value = children.get("k_proj", fused), children.get("v_proj", fused)
        if key is None or value is None:
            continue
        if type(key) is not nn.Linear or type(value) is not nn.Linear or key.weight.is_meta:
            return None  # weights that accelerate keeps elsewhere are on meta
        norm = next((layer._modules[name] for name in _NORMS if layer._modules.get(name) is not None), None)
        key_norm = next((children[name] for name in _KEY_NORMS if children.get(name) is not None), None)
        if any(m is not None and getattr(m, "weight", None) is None for m in (norm, key_norm)):
            return None
        return _Parts(norm, key, value, key_norm)
    return None


def _readings(parts: _Parts) -> Iterator[_Facts]:
    """Ways to read a layer's modules, the likeliest first."""

    def kinds(norm: Any) -> list[str | None]:
        if norm is None:
            return [None]
        return ["layer", "rms"] if isinstance(norm, nn.LayerNorm) else ["rms", "layer"]

    for grouped in (False, True) if parts.key is parts.value else (False,):
        for norm, key_norm in itertools.product(kinds(parts.norm), kinds(parts.key_norm)):
            for shift, interleaved in itertools.product((0.0, 1.0), (False, True)):
                yield _Facts(norm, shift, key_norm, interleaved, grouped)


def _layer_of(parts: _Parts, facts: _Facts, heads: int, size: int) -> KVLayer | None:
    """A layer's parameters as kv_fill takes them; None where they do not have the shapes for it."""
    both, fused = heads * size, parts.key is parts.value

    def by_head(linear: Any, values: bool) -> tuple[Tensor, Tensor | None] | None:
        """Weight [Hkv, Dh, D] and bias [Hkv, Dh] of the keys, or of the values, as views."""

        def view(t: Tensor) -> Tensor:
            if not fused:
                return t.unflatten(0, (heads, size))
            if facts.grouped:
                return t.unflatten(0, (heads, -1, size))[:, -1 if values else -2]
            end = len(t) if values else len(t) - both
            return t[end - both : end].unflatten(0, (heads, size))

        rows = linear.weight.shape[0]
        if rows != both if not fused else rows < 2 * both or (facts.grouped and rows % both):
            return None
        return view(linear.weight.detach()), None if linear.bias is None else view(linear.bias.detach())

    key, value = by_head(parts.key, False), by_head(parts.value, True)
    if key is None or value is None:
        return None
    norm_bias = getattr(parts.norm, "bias", None)
    return KVLayer(
        key[0], value[0], key[1], value[1],
        norm_weight=None if parts.norm is None else parts.norm.weight.detach(),
        norm_bias=None if norm_bias is None else norm_bias.detach(),
        key_norm=None if parts.key_norm is None else parts.key_norm.weight.detach(),
    )  # fmt: skip


def _stack_of(layers: list[KVLayer], parts: list[_Parts], facts: _Facts, packed: bool = False) -> KVStack | None:
    """A stack of such layers; None where they differ in what kv_fill takes as one."""
    eps = {eps_of(p.norm) or 0.0 for p in parts}
    key_eps = {eps_of(p.key_norm) or 0.0 for p in parts}
    if len(eps) > 1 or len(key_eps) > 1:
        return None
    try:
        return KVStack(
            layers, norm=facts.norm, eps=eps.pop(), key_norm=facts.key_norm, key_eps=key_eps.pop(), shift=facts.shift,
            interleaved=facts.interleaved, packed=packed,
        )  # fmt: skip
    except (ValueError, TypeError):
        return None


def _agrees(parts: _Parts, seen: _Seen, facts: _Facts) -> bool | None:
    """Whether this reading of a layer, with its rotary embedding (True) or without (False), gives what it made."""
    heads, size = seen.keys.shape[1], seen.keys.shape[3]
    layer = _layer_of(parts, facts, heads, size)
    stack = None if layer is None else _stack_of([layer], [parts], facts)
    if stack is None or seen.hidden.dtype not in DTYPES or {seen.keys.dtype, seen.values.dtype} != {stack.dtype}:
        return None  # under autocast keys and values need not even agree with each other
    slots = torch.arange(len(seen.hidden), device=seen.hidden.device)
    first = torch.zeros_like(slots)
    eps = torch.finfo(stack.dtype).eps * (64 if stack.dtype == torch.float32 else 4)
    for turned in (True, False) if seen.rotary is not None else (False,):
        keys, values = torch.zeros_like(seen.keys), torch.zeros_like(seen.values)
        rotary = seen.rotary if turned else None
        if rotary is not None and rotary[0].shape[-1] > size:
            continue
        kv_fill(seen.hidden, first, first, slots, stack, KVCache([keys], [values]), rotary=rotary)
        pairs = ((keys, seen.keys), (values, seen.values))
        if all((a.float() - b.float()).abs().max() <= eps * b.float().abs().max() for a, b in pairs):
            return turned
    return None
