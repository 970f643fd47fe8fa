"""The parts of a stock language model that early exit touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exeunt import ops
from exeunt.stats import ExitStats

__all__ = ["FinalNorm", "HeadForm", "Structure", "eps_of", "evaluating", "told"]


def told(reason: Exception) -> str:
    """The kind of an exception and the first line of what it says, for a sentence of ours.

    Examples
    --------
    >>> from exeunt.models.structure import told
    >>> told(ValueError("no such layer\\nand more"))
    'ValueError: no such layer'
    """
    first, _, _ = str(reason).partition("\n")
    return f"{type(reason).__name__}: {first}"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; every module goes back to its own mode afterwards.

    Examples
    --------
    >>> from torch import nn
    >>> from exeunt.models import evaluating
    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def eps_of(norm: Any) -> float | None:
    """The eps of a norm, whatever its family calls it; None where it has none.

    Examples
    --------
    >>> from torch import nn
    >>> from exeunt.models.structure import eps_of
    >>> eps_of(nn.LayerNorm(8, eps=1e-6)), eps_of(nn.Linear(8, 8))
    (1e-06, None)
    """
    return next((float(getattr(norm, k)) for k in ("variance_epsilon", "eps") if hasattr(norm, k)), None)


@dataclass(frozen=True)
class FinalNorm:
    """The model's last norm in the terms of ``exit_stats``; its parameters are read where they live.

    Attributes
    ----------
    kind : str
        ``rms`` or ``layer``.
    eps : float
        Added under the root.
    module : nn.Module
        The norm itself.
    offset : float
        Added to its weight before it multiplies (1 for Gemma's norms).

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import discover
    >>> norm = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))).final_norm
    >>> norm.kind, norm.eps, norm.weight.shape, norm.bias
    ('rms', 1e-06, torch.Size([32]), None)
    """

    kind: str
    eps: float
    module: Any
    offset: float = 0.0

    @property
    def weight(self) -> Tensor:
        """[D] weight."""
        return self.module.weight.detach().float() + self.offset if self.offset else self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[D] bias, where there is one."""
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class HeadForm:
    """What a model does around the product with its output embedding.

    ``logits = cap(scale * head(before * x) + bias)`` with x the state after the last norm and ``cap(z) = softcap *
    tanh(z / softcap)``. Facts found at attach and checked against the model's own logits.

    Attributes
    ----------
    before : float
        Factor on the head's input (T5 with tied embeddings).
    scale : float
        Factor on its output (Cohere, Granite).
    softcap : float or None
        Bound by tanh (Gemma 2).
    bias : str or None
        Name of the model's own buffer that is added to the output (BART, Marian), never together with a scale.

    Examples
    --------
    >>> from transformers import GraniteConfig, GraniteForCausalLM
    >>> from exeunt.models import discover
    >>> form = discover(GraniteForCausalLM(GraniteConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0))).form
    >>> form
    HeadForm(before=1.0, scale=0.125, softcap=None, bias=None)
    >>> form.plain
    False
    """

    before: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    bias: str | None = None

    @property
    def plain(self) -> bool:
        """Whether the head's product is all there is."""
        return self == HeadForm()


@dataclass(frozen=True)
class Structure:
    """The parts of a decoder that early exit touches.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The language model.
    decoder : nn.Module
        The module that runs the layers.
    layers : tuple of nn.Module
        Its decoder layers in the order in which they run.
    tail : tuple of nn.Module
        What the decoder applies after the last layer: its final norm, and a projection where there is one.
    final_norm : FinalNorm or None
        That norm as the fused op takes it; None where the op has no equal, then ``tail`` is applied first.
    head : nn.Module
        The output embedding.
    form : HeadForm or None
        What happens around it; None where that could not be found: then no exit may read the head.
    batched : mapping of str to int
        Arguments of the layers whose first dimension is not the batch: how many times the batch it is, 0 for none of
        it (MPT's alibi). Everything else that has the batch first is picked by rows.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> structure, hidden = discover(model), torch.randn(3, 32)  # what some layer gave
    >>> stats = structure.exit_stats(hidden)
    >>> torch.equal(stats.argmax, model.lm_head(model.model.norm(hidden)).argmax(-1))
    True
    """

    model: Any
    decoder: Any
    layers: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    final_norm: FinalNorm | None
    head: Any
    form: HeadForm | None = HeadForm()
    batched: Mapping[str, int] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """[V, D] weight of the output embedding, as it is now."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """[V] what the model adds to the head's output, beside the head's own bias."""
        if self.form is None or self.form.bias is None:
            return None
        return getattr(self.model, self.form.bias).flatten()

    def trainable(self) -> Structure:
        """This structure, if exits can be trained on it; ValueError where the loss would not see the model's logits."""
        if self.form is None or not self.form.plain or self.model.config.is_encoder_decoder:
            raise ValueError(
                "training: expected a decoder alone whose logits are head(norm(hidden)), "
                f"got {type(self.model).__name__} with {self.form}"
            )
        return self

    def normalise(self, hidden: Tensor) -> Tensor:
        """Apply what the decoder applies after its last layer."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads of a layer's output."""
        hidden = self.normalise(hidden)
        return hidden if self.form is None or self.form.before == 1.0 else hidden * self.form.before

    def logits_buffer(self, state: Tensor, batch: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype of the ``logits_out`` of :meth:`exit_stats`."""
        # A bias goes in for the statistics and comes out again: in float32 that costs the product nothing.
        return (batch, self.weight.shape[0]), state.dtype if self.bias is None else torch.float32

    def exit_stats(
        self,
        state: Tensor,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        topk: int = 0,
        logits_out: Tensor | None = None,
    ) -> ExitStats:
        """Statistics of the logits that the model would give for a layer's output, by one read of the head.

        Parameters
        ----------
        state : Tensor
            [N, D] states, before the last norm.
        rows : Tensor, optional
            Only these of them.
        columns : Tensor, optional
            [K] ids: only these words.
        topk : int, default 0
            How many of the largest logits are wanted too.
        logits_out : Tensor, optional
            [N, V] (:meth:`logits_buffer`): receives the head's own output, to be passed to :meth:`raw`.
        """
        form, norm, weight, outer = self.form, self.final_norm, self.weight, self.bias
        assert form is not None
        scale_in, norm_weight, norm_bias = form.before, None, None
        if norm is None:
            state = self.head_input(state)
        else:
            norm_weight, norm_bias = norm.weight, norm.bias
            if scale_in != 1.0:
                norm_weight = norm_weight.detach().float() * scale_in
                norm_bias = None if norm_bias is None else norm_bias.detach().float() * scale_in
        own = getattr(self.head, "bias", None)
        if outer is not None:
            own = outer if own is None else own + outer
        return ops.exit_stats(
            state.detach(),
            weight.detach(),
            head_bias=None if own is None else own.detach(),
            norm=norm.kind if norm else None,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=norm.eps if norm else 0.0,
            scale=form.scale,
            softcap=form.softcap,
            rows=rows,
            columns=columns,
            topk=topk,
            logits_out=logits_out,
        )

    def candidate_logits(self, state: Tensor, ids: Tensor) -> Tensor:
        """Logits [N, k] float32 of words ids [N, k], each row's own, for states [N, D]; no other word is read."""
        assert self.form is not None
        found = []
        for some, own in zip(state.split(16), ids.split(16), strict=True):  # a block reads the words of all its rows
            n, k = own.shape
            raw = some.new_empty((n, n * k), dtype=torch.float32)
            self.exit_stats(some, columns=own.flatten(), logits_out=raw)
            each = torch.arange(n, device=raw.device)
            found.append(raw.view(n, n, k)[each, each] * self.form.scale)
        logits = torch.cat(found) if found else state.new_empty(ids.shape, dtype=torch.float32)
        cap = self.form.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def raw(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """What the head itself gives, of a buffer that :meth:`exit_stats` wrote; the model's own tail still applies."""
        return logits if self.bias is None else (logits - self.bias).to(dtype)
