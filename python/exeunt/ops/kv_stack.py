"""What kv_fill knows of a model and of its cache: where parameters, keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from exeunt.memory import zeros_on_huge_pages
from exeunt.ops import _backend
from exeunt.ops._backend import DTYPES, NORMS, pointer
from exeunt.ops.packed_head import in_tiles, vectors_multiply

__all__ = ["KVCache", "KVLayer", "KVStack"]


@dataclass(frozen=True, eq=False)
class KVLayer:
    """The parameters of one layer between its hidden state and its keys and values, as views of the model's own.

    Attributes
    ----------
    key, value : Tensor
        [Hkv, Dh, D] weights with unit stride along D: a view, of a fused projection too.
    key_bias, value_bias : Tensor, optional
        [Hkv, Dh].
    norm_weight, norm_bias : Tensor, optional
        [D], of the norm before the projections.
    key_norm : Tensor, optional
        [Dh] or [Hkv, Dh], weight of a norm over each head's keys, before the rotary embedding.

    Examples
    --------
    >>> import torch
    >>> from exeunt.ops import KVLayer, KVStack
    >>> fused = torch.randn(3 * 2 * 16, 64)  # queries, keys and values of 2 heads of 16
    >>> _, key, value = (part.unflatten(0, (2, 16)) for part in fused.chunk(3))
    >>> layer = KVLayer(key, value, norm_weight=torch.ones(64))
    >>> KVStack([layer], norm="rms")
    KVStack(1 layers, D=64, Hkv=2, Dh=16, torch.float32)
    """

    key: Tensor
    value: Tensor
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    key_norm: Tensor | None = None


class KVStack:
    """Norms and key / value projections of all layers of a model, for :func:`exeunt.ops.kv_fill`.

    It is a table of addresses of the model's own parameters, so a weight that is changed in place is used as it is now.
    A parameter that is *replaced* by another tensor needs another stack. Nothing is copied unless ``packed`` asks for
    it.

    Parameters
    ----------
    layers : sequence of KVLayer
        In the order of the model's layers; all of one shape, dtype and device.
    norm : {None, "rms", "layer"}
        Norm before the projections, the same in every layer.
    eps : float, default 1e-6
        Of that norm.
    key_norm : {None, "rms", "layer"}
        Norm over each head's keys.
    key_eps : float, default 1e-6
        Of that norm.
    shift : float, default 0.0
        Added to the weights of both norms (Gemma's ``1 + w``: 1.0).
    interleaved : bool, default False
        Rotary pairs are neighbours (GPT-J, Cohere), not half the table apart.
    packed : bool, default False
        On CPU, read a copy of the projections whose rows lie as in a :class:`PackedHead`, which memory serves faster
        (``docs/kernels.md`` has figures); the results have the same bits. ``nbytes`` says what it costs. A projection
        that is changed in place then needs another stack, too: :func:`kv_fill` refuses this one (but inference tensors
        do not tell).

    Raises
    ------
    ValueError, TypeError
        One sentence on what was expected and what came.

    Examples
    --------
    >>> import torch
    >>> from exeunt.ops import KVLayer, KVStack
    >>> layers = [KVLayer(torch.randn(2, 16, 64), torch.randn(2, 16, 64), norm_weight=torch.ones(64)) for _ in range(3)]
    >>> KVStack(layers, norm="rms")
    KVStack(3 layers, D=64, Hkv=2, Dh=16, torch.float32)
    """

    def __init__(
        self,
        layers: Sequence[KVLayer],
        *,
        norm: str | None = None,
        eps: float = 1e-6,
        key_norm: str | None = None,
        key_eps: float = 1e-6,
        shift: float = 0.0,
        interleaved: bool = False,
        packed: bool = False,
    ) -> None:
        if not layers:
            raise ValueError("KVStack: expected at least one layer, got none")
        for name, kind in (("norm", norm), ("key_norm", key_norm)):
            if kind not in NORMS:
                raise ValueError(f"KVStack: {name} must be None, 'rms' or 'layer', got {kind!r}")
        self.layers = tuple(layers)
        self.norm, self.eps, self.key_norm, self.key_eps = norm, eps, key_norm, key_eps
        self.shift, self.interleaved = shift, interleaved
        first = self.layers[0].key
        if first.dim() != 3 or 0 in first.shape:
            raise ValueError(f"KVStack: key must have shape [Hkv, Dh, D], got {[*first.shape]}")
        if first.dtype not in DTYPES:
            raise TypeError(f"KVStack: key must be float32, bfloat16 or float16, got {first.dtype}")
        self.heads, self.head_size, self.width = first.shape
        self.dtype, self.device = first.dtype, first.device
        #: What a cache must have in common with it, as ``KVCache.kind``.
        self.kind = len(self.layers), self.heads, self.head_size, self.dtype, self.device
        for index, layer in enumerate(self.layers):
            self._check(index, layer)
        self._copy = self._packed() if packed else None
        self._tables: list[Tensor] = []  # which kernels read
        weights = [t for layer in self.layers for t in (layer.key, layer.value)] if packed else []
        self._packed_from = [t for t in weights if not t.is_inference()]  # those that have a version
        self._versions = [t._version for t in self._packed_from]

    def _check(self, index: int, layer: KVLayer) -> None:
        heads, size, width = self.heads, self.head_size, self.width
        allowed: dict[str, list[tuple[int, ...]]] = {
            "key": [(heads, size, width)], "value": [(heads, size, width)],
            "key_bias": [(heads, size)], "value_bias": [(heads, size)],
            "norm_weight": [(width,)], "norm_bias": [(width,)],
            "key_norm": [(size,), (heads, size)],
        }  # fmt: skip
        for name, shapes in allowed.items():
            t = getattr(layer, name)
            if t is None:
                continue
            if tuple(t.shape) not in shapes:
                wanted = " or ".join(str([*s]) for s in shapes)
                raise ValueError(f"KVStack: {name} of layer {index} must have shape {wanted}, got {[*t.shape]}")
            if (t.dtype, t.device) != (self.dtype, self.device):
                raise TypeError(
                    f"KVStack: {name} of layer {index} must be {self.dtype} on {self.device} like the first key, "
                    f"got {t.dtype} on {t.device}"
                )
            if t.stride(-1) != 1:
                raise ValueError(f"KVStack: {name} of layer {index} must have unit stride, got {[*t.stride()]}")
        if (layer.key_norm is not None) != (self.key_norm is not None):
            raise ValueError(f"KVStack: layer {index} must have a key_norm weight exactly if key_norm names its kind")

    def __len__(self) -> int:
        """Layers."""
        return len(self.layers)

    def __repr__(self) -> str:
        """Sizes."""
        sizes = f"D={self.width}, Hkv={self.heads}, Dh={self.head_size}, {self.dtype}"
        return f"KVStack({len(self)} layers, {sizes})"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that packed projections take; 0 where nothing is copied."""
        return 0 if self._copy is None else self._copy.nbytes

    @property
    def stale(self) -> bool:
        """Whether a projection was changed in place after it was packed."""
        return [t._version for t in self._packed_from] != self._versions

    def _packed(self) -> Tensor:
        """[L, 2, Hkv, tiles, lines, ...]: keys and values, in the order in which they are read."""
        if self.device.type != "cpu":
            raise ValueError(f"KVStack: packed needs weights on cpu, got {self.device}")
        with torch.no_grad():
            # Of floats, tile registers would multiply parts, and give other bits.
            turned = self.dtype != torch.bfloat16 or vectors_multiply()
            first = in_tiles(self.layers[0].key, turned)
            copy = zeros_on_huge_pages((len(self), 2, *first.shape), self.dtype)
            for own, layer in zip(copy, self.layers, strict=True):
                own[0], own[1] = in_tiles(layer.key, turned), in_tiles(layer.value, turned)
        return copy

    @cached_property
    def kernel(self) -> Any:
        """``KvFill`` of the device's module, over the packed copy where there is one; None where it has no kernel."""
        if self._copy is not None:  # WeightForm of csrc/core/params.h, 7: tiles; 8: turned (packed_head.in_tiles)
            return self._kernel_over(self._copy, form=self._copy.dim() - 6)
        return self._kernel_over([(layer.key, layer.value) for layer in self.layers], form=0)

    def _kernel_over(self, projections: Any, form: int) -> Any:
        kernels = _backend.kernels(self.device)
        if kernels is None:
            return None
        fields = [_fields(layer, *own) for layer, own in zip(self.layers, projections, strict=True)]
        #: [L, 14] int64 on the stack's device: a ``KvLayer`` of csrc/core/params.h a row, which the kernel reads.
        table = torch.tensor(fields, dtype=torch.int64, device=self.device)
        self._tables.append(table)
        return kernels.KvFill(
            self.width, self.heads, self.head_size, DTYPES[self.dtype], NORMS[self.norm], self.eps,
            NORMS[self.key_norm], self.key_eps, self.shift, self.interleaved, form, len(self), table.data_ptr(),
        )  # fmt: skip


def _fields(layer: KVLayer, key: Tensor, value: Tensor) -> list[int]:
    def strides(weight: Tensor) -> tuple[int, int]:
        return weight.stride(0) * weight.element_size(), weight.stride(1) * weight.element_size()

    def head_stride(vector: Tensor | None) -> int:
        return 0 if vector is None or vector.dim() == 1 else vector.stride(0)

    return [
        pointer(layer.norm_weight), pointer(layer.norm_bias),
        pointer(key), *strides(key), pointer(value), *strides(value),
        pointer(layer.key_bias), pointer(layer.value_bias), head_stride(layer.key_bias), head_stride(layer.value_bias),
        pointer(layer.key_norm), head_stride(layer.key_norm),
    ]  # fmt: skip


class KVCache:
    """Where the keys and values of all layers go, for :func:`exeunt.ops.kv_fill`: a table of their addresses.

    Make another when a tensor of the cache is replaced by a larger one. On CUDA the table is copied to the device: make
    it before a graph is captured, not within.

    Parameters
    ----------
    keys, values : sequence of Tensor
        One a layer, [B, Hkv, S, Dh] with unit stride along Dh, all of one dtype and device. Capacities S may differ.

    Raises
    ------
    ValueError, TypeError
        One sentence on what was expected and what came.

    Examples
    --------
    >>> import torch
    >>> keys, values = ([torch.zeros(4, 2, 8, 16) for _ in range(3)] for _ in range(2))
    >>> KVCache(keys, values)
    KVCache(3 layers, B=4, Hkv=2, S=8, Dh=16, torch.float32)
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        if not keys or len(keys) != len(values):
            raise ValueError(f"KVCache: expected as many keys as values, got {len(keys)} and {len(values)}")
        first = keys[0]
        if first.dim() != 4:
            raise ValueError(f"KVCache: keys must have shape [B, Hkv, S, Dh], got {[*first.shape]}")
        self.dtype, self.device = first.dtype, first.device
        self.batch, self.heads, _, self.head_size = first.shape
        #: Slots of each layer.
        self.capacities: list[int] = []
        fields = []
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            for name, t in zip(("keys", "values"), pair, strict=True):
                shape = [self.batch, self.heads, t.shape[-2] if t.dim() > 1 else 0, self.head_size]
                if [*t.shape] != shape:
                    raise ValueError(f"KVCache: {name} of layer {layer} must have shape {shape}, got {[*t.shape]}")
                if (t.dtype, t.device) != (self.dtype, self.device):
                    raise TypeError(
                        f"KVCache: {name} of layer {layer} must be {self.dtype} on {self.device} like the first keys, "
                        f"got {t.dtype} on {t.device}"
                    )
                if t.stride(3) != 1:
                    raise ValueError(
                        f"KVCache: {name} of layer {layer} must have unit stride along Dh, got {[*t.stride()]}"
                    )
            self.capacities.append(min(t.shape[2] for t in pair))
            fields.append([t.data_ptr() for t in pair] + [s for t in pair for s in t.stride()[:3]])
        self.keys, self.values = tuple(keys), tuple(values)
        #: [L, 8] int64 on the cache's device: a ``KvPlace`` of csrc/core/params.h a row.
        self.table = torch.tensor(fields, dtype=torch.int64, device=self.device)
        self._slots = torch.tensor(self.capacities, dtype=torch.int64, device=self.device)
        #: Layers, heads, head size, dtype and device: what a stack must have in common with its cache.
        self.kind = len(fields), self.heads, self.head_size, self.dtype, self.device
        #: Addresses of the table and of the capacities.
        self.addresses = self.table.data_ptr(), self._slots.data_ptr()

    def __len__(self) -> int:
        """Layers."""
        return len(self.keys)

    def __repr__(self) -> str:
        """Sizes."""
        sizes = f"B={self.batch}, Hkv={self.heads}, S={min(self.capacities)}, Dh={self.head_size}, {self.dtype}"
        return f"KVCache({len(self)} layers, {sizes})"
