"""Inputs that the tests of several ops share."""

from __future__ import annotations

import math

import torch


def make(n, v, d, dtype, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    head = (torch.randn(v, d, generator=g) * spread / math.sqrt(d)).to(dtype)
    return hidden, head


def norm_args(kind, d, dtype, seed=1):
    if kind is None:
        return {}
    g = torch.Generator().manual_seed(seed)
    args = dict(norm=kind, norm_weight=(torch.rand(d, generator=g) + 0.5).to(dtype), eps=1e-5)
    if kind == "layer":
        args["norm_bias"] = (torch.randn(d, generator=g) * 0.1).to(dtype)
    return args


def lies_turned(isa, dtype):
    """Whether vector registers turn a weight that lies as it is, so that it has a packed one's bits (product.cpp)."""
    return dtype != torch.float16 and isa not in ("baseline", "avx2")
