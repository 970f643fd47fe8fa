"""What `fit` trains: modules that turn a batch into the loss of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exeunt.heads import ExitHeads
from exeunt.models import EncoderStructure, Structure, discover
from exeunt.training.objectives import Objective
from exeunt.training.terms import Depth

__all__ = ["Joint", "Recorded", "select", "watch"]


class Joint(nn.Module):
    """A causal language model with exits, trained on tokens.

    ``joint(ids)`` takes [B, S + 1] token ids and returns the loss of predicting each but the first.

    Parameters
    ----------
    model : transformers model for causal language modelling
    exits : iterable of int
        0-based layers after which there are losses beside full depth.
    objective : Objective
    heads : ExitHeads, optional
        What the exits have of their own.
    bf16 : bool, default False
        Compute in bfloat16 (autocast); parameters stay as they are.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import Joint, parse
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> joint = Joint(model, [1], parse("ce + 0.5*kl", [1, 3]))
    >>> loss = joint(torch.randint(64, (2, 9)))
    >>> loss.backward()
    >>> loss.shape, joint.measured(torch.randint(64, (2, 9)))[1][1].shape
    (torch.Size([]), torch.Size([16]))
    """

    def __init__(
        self,
        model: Any,
        exits: Iterable[int],
        objective: Objective,
        heads: ExitHeads | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.heads, self.bf16 = model, objective, heads, bf16
        self.structure = discover(model).trainable()
        self.exits = check_exits(exits, len(self.structure.layers))

    def forward(self, ids: Tensor) -> Tensor:
        """The loss."""
        return self.measured(ids)[0]

    def measured(self, ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and per exit [B * S] whether its token is that of full depth."""
        return self.objective(self.depths(ids[:, :-1]), ids[:, 1:].flatten(), self.heads)

    def depths(self, ids: Tensor) -> dict[int, Depth]:
        """States at the exits and at full depth, [B * S, D] each."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            return self._depths(ids)

    def _depths(self, ids: Tensor) -> dict[int, Depth]:
        s = self.structure
        with watch(s, self.exits) as states:
            last = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        head = (s.weight, getattr(s.head, "bias", None))
        dtype = torch.bfloat16 if self.bf16 else last.dtype
        depths = {}
        for exit in self.exits:
            raw = states[exit]
            moved = raw if self.heads is None or exit not in self.heads else self.heads[exit].state(raw)
            depths[exit] = Depth(raw.flatten(0, 1), s.normalise(moved).flatten(0, 1).to(dtype), *head)
        last = last.flatten(0, 1)
        depths[len(s.layers) - 1] = Depth(last, last.to(dtype), *head)
        return depths


class Recorded(nn.Module):
    """Exit heads of a frozen causal language model, trained on recorded states.

    ``recorded((states, labels))`` takes [N, exits + 1, D] states, the last of which the model's head reads, and [N]
    labels, and returns the loss.

    Parameters
    ----------
    structure : Structure
        Of the model, which must not ask for gradients.
    heads : ExitHeads
    objective : Objective
    length : int, default 1
        The N tokens are sequences of so many, for heads that look at the tokens before.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.heads import ExitHead, ExitHeads, Translator
    >>> from exeunt.models import discover
    >>> from exeunt.training import Recorded, parse
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).requires_grad_(False)
    >>> recorded = Recorded(discover(model), ExitHeads({1: ExitHead(Translator(32))}), parse("kl", [1, 3]))
    >>> recorded((torch.randn(6, 2, 32), torch.randint(64, (6,)))).backward()
    >>> recorded.heads[1].translator.down.weight.grad.shape
    torch.Size([32, 64])
    """

    def __init__(self, structure: Structure, heads: ExitHeads, objective: Objective, length: int = 1) -> None:
        super().__init__()
        self.structure, self.heads, self.objective, self.length = structure, heads, objective, length
        self._model = structure.model  # registered, so that it moves to the device along with the heads

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return self.measured(batch)[0]

    def measured(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and per exit [N] whether its token is that of full depth."""
        states, labels = batch
        return self.objective(self.depths(states), labels, self.heads)

    def depths(self, states: Tensor) -> dict[int, Depth]:
        """States at the exits and at full depth, [N, D] each."""
        s = self.structure
        head = (s.weight, getattr(s.head, "bias", None))
        depths = {}
        for i, exit in enumerate(self.heads):
            raw = states[:, i]
            # Heads are float32 while they are trained; products and what the model's head reads are of its dtype.
            with torch.autocast(raw.device.type, s.weight.dtype, enabled=s.weight.dtype == torch.bfloat16):
                moved = self.heads[exit].state(raw.float().unflatten(0, (-1, self.length))).flatten(0, 1)
            depths[exit] = Depth(raw, s.normalise(moved).to(s.weight.dtype), *head)
        depths[len(s.layers) - 1] = Depth(states[:, -1], states[:, -1].to(s.weight.dtype), *head)
        return depths


def check_exits(exits: Iterable[int], layers: int) -> tuple[int, ...]:
    """`exits` in ascending order.

    Raises
    ------
    ValueError
        If one lies outside 0..L-2.
    """
    chosen = tuple(sorted(set(exits)))
    if not chosen or not all(0 <= exit <= layers - 2 for exit in chosen):
        raise ValueError(f"exits must lie in 0..{layers - 2} for a model of {layers} layers, got {list(chosen)}")
    return chosen


@contextmanager
def watch(structure: Structure | EncoderStructure, exits: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """A mapping that every forward fills with the states after these layers, [B, S, D].

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import discover
    >>> from exeunt.training.modules import watch
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> with watch(discover(model), [0, 2]) as states:
    ...     out = model(torch.tensor([[3, 5, 7]]))
    >>> {layer: list(state.shape) for layer, state in states.items()}
    {0: [1, 3, 32], 2: [1, 3, 32]}
    """
    states: dict[int, Tensor] = {}

    def keep(exit: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            states[exit] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [structure.layers[exit].register_forward_hook(keep(exit)) for exit in exits]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def select(module: Joint, which: str) -> None:
    """Choose what is trained.

    Parameters
    ----------
    module : Joint
    which : str
        ``heads``: the exit heads. ``last-K``, such as ``last-2``: beside these the last K layers, the final norm and
        an output embedding of its own. ``all``: everything.

    Raises
    ------
    ValueError
        At another word, or more layers than there are.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import Joint, parse, select
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> joint = Joint(model, [1], parse("ce", [1, 3]))
    >>> select(joint, "last-1")
    >>> [p.requires_grad for p in (model.model.layers[2].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)]
    [False, True]
    """
    module.requires_grad_(which == "all")
    if module.heads is not None:
        module.heads.requires_grad_(True)
    if which in ("heads", "all"):
        return
    s = module.structure
    name, _, count = which.partition("-")
    if name != "last" or not count.isdecimal() or not 1 <= int(count) <= len(s.layers):
        raise ValueError(f"what to train must be heads, last-K with K in 1..{len(s.layers)}, or all, got {which!r}")
    tied = s.weight is s.model.get_input_embeddings().weight
    for part in (*s.layers[-int(count) :], *s.tail, *(() if tied else (s.head,))):
        part.requires_grad_(True)
