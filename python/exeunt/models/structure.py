"""Finding the parts of a stock causal language model, each fact checked numerically before it is believed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FinalNorm", "Structure", "discover"]

CACHE_KEYWORD = "past_key_values"


@dataclass(frozen=True)
class FinalNorm:
    """The model's last norm in the terms of ``exit_stats``; its parameters are read where they live."""

    kind: str
    eps: float
    module: Any

    @property
    def weight(self) -> Tensor:
        """[D] weight."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[D] bias, where there is one."""
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Structure:
    """The parts of a decoder that early exit touches.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The causal language model.
    layers : tuple of nn.Module
        Its decoder layers in the order in which they run.
    tail : tuple of nn.Module
        What the decoder applies after the last layer: its final norm.
    final_norm : FinalNorm or None
        That norm as the fused op takes it; None where the op has no equal, then ``tail`` is applied first.
    head : nn.Module
        The output embedding.
    """

    model: Any
    layers: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    final_norm: FinalNorm | None
    head: Any

    @property
    def weight(self) -> Tensor:
        """[V, D] weight of the output embedding, as it is now."""
        return self.head.weight

    def normalise(self, hidden: Tensor) -> Tensor:
        """Apply what the decoder applies after its last layer."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden


def discover(model: Any) -> Structure:
    """Find layers, final norm and head of a stock causal language model.

    One forward of four tokens checks that ``head(norm(last layer))`` gives the model's own logits bit for bit.

    Parameters
    ----------
    model : nn.Module
        A transformers model for causal language modelling.

    Returns
    -------
    Structure

    Raises
    ------
    ValueError
        Where a part is missing or the logits come about in another way; one sentence says which.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> len(discover(LlamaForCausalLM(config)).layers)
    3
    """
    name = type(model).__name__
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList)] if decoder is not None else []
    if decoder is None or decoder is model or not stacks:
        raise ValueError(f"attach: expected a causal language model with a stack of decoder layers, got {name}")
    stack = max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()))
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise ValueError(f"attach: expected an output embedding with a [V, D] weight, got none in {name}")
    for layer in stack:
        if CACHE_KEYWORD not in inspect.signature(layer.forward).parameters:
            raise ValueError(
                f"attach: expected decoder layers that take {CACHE_KEYWORD}, got {type(layer).__name__} which does not"
            )

    layers, tail = _trace(model, decoder, stack, head)
    return Structure(model, layers, tail, _final_norm(tail, head.weight), head)


@torch.no_grad()
def _trace(
    model: Any, decoder: nn.Module, stack: nn.ModuleList, head: Any
) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """Run four tokens; return the layers and the modules after them, in call order."""
    calls: list[nn.Module] = []
    states: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(module)
        states.append(output[0] if isinstance(output, tuple) else output)

    watched = [*stack, *(m for m in decoder.children() if m is not stack)]
    handles = [m.register_forward_hook(note) for m in watched]
    training = model.training
    try:
        model.eval()
        ids = torch.arange(1, 5, device=head.weight.device).remainder(head.weight.shape[0])[None]
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()

    members = set(stack)
    at = [k for k, m in enumerate(calls) if m in members]
    name = type(model).__name__
    layers = tuple(calls[k] for k in at)
    if len(layers) < 2 or len(set(layers)) != len(layers):
        raise ValueError(f"attach: expected at least two decoder layers, each called once, got {len(layers)} in {name}")
    tail = tuple(calls[at[-1] + 1 :])
    hidden = states[at[-1]]
    for module in tail:
        hidden = module(hidden)
    if not torch.equal(head(hidden), logits):
        raise ValueError(
            f"attach: expected the logits of {name} to be head(norm(hidden)), "
            "got others (a scaled or capped head is not supported yet)"
        )
    return layers, tail


@torch.no_grad()
def _final_norm(tail: tuple[nn.Module, ...], weight: Tensor) -> FinalNorm | None:
    """The tail as one RMS or layer norm, if it behaves like one on a random state."""
    if len(tail) != 1 or not isinstance(getattr(tail[0], "weight", None), Tensor):
        return None
    norm: Any = tail[0]
    eps = next((float(getattr(norm, k)) for k in ("variance_epsilon", "eps") if hasattr(norm, k)), None)
    if eps is None:
        return None
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(weight)
    x32 = x.float()
    if kind == "layer":
        x32 = x32 - x32.mean(-1, keepdim=True)
    expected = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * norm.weight.float()
    bias = getattr(norm, "bias", None)
    if bias is not None:
        expected = expected + bias.float()
    tolerance = 16 * torch.finfo(weight.dtype).eps
    if not torch.allclose(norm(x).float(), expected, rtol=tolerance, atol=tolerance):
        return None
    return FinalNorm(kind, eps, norm)
