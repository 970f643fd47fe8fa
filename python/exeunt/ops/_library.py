"""Registration with torch.library: what makes an op traceable, and where its missing gradient is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_lib = torch.library.Library("exeunt", "DEF")


def define(name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any], inputs: int = 1) -> None:
    """Register ``exeunt::name``: one forward for every device, a fake for tracing, a sentence instead of a gradient.

    It is said of the first ``inputs`` arguments, the states; whether weights require a gradient nobody asks.
    """

    names = [part.rpartition(" ")[2] for part in schema[1:].split(")")[0].split(",")[:inputs]]

    def autograd(*args: Any) -> Any:
        for wanting, arg in zip(names, args[:inputs], strict=True):
            if torch.is_grad_enabled() and arg.requires_grad:
                raise RuntimeError(
                    f"{name} has no gradient and {wanting} requires one: call it under torch.no_grad(), or use "
                    f"exeunt.reference.{name}, which is differentiable"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.exeunt, name)(*args)

    _lib.define(name + schema)
    _lib.impl(name, forward, "CompositeExplicitAutograd")
    _lib.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"exeunt::{name}", fake, lib=_lib)
