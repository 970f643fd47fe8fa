"""Training a model as it will run: tokens leave early, and later ones attend to what skipped layers made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt.training.modules import Joint, watch
from exeunt.training.objectives import Objective
from exeunt.training.terms import Depth

__all__ = ["PASSED", "SAID", "Leaving", "frozen_after"]

PASSED, SAID, FULL = 0, 1, 2  # what a `Leaving` objective weighs, in the place of depths
ROWS = 512  # whose logits exist at a time
STAY = 0.25  # of the sequences run at full depth


class Leaving(Joint):
    """A causal language model whose tokens leave early while it is trained.

    Every step runs the model twice. The first pass, at full depth and without gradients, is the teacher; its exits
    also say which tokens would leave where: each sequence draws a threshold for the margin and, for every exit,
    whether it is open, so that one training serves many settings; a quarter of the sequences stays at full depth. In
    the second pass a token's state is frozen after the exit at which it leaves, so that deeper layers compute its keys
    and values from that state: the propagation of CALM (Schuster et al., 2022, section 3.2), which training at full
    depth never shows to the deeper layers.

    The objective sees three depths:

    - `PASSED`: the state of the second pass after an exit drawn for each token,
    - `SAID`: that with which the token leaves, at full depth where it does not,
    - full depth of the first pass, the teacher, which gets no gradient.

    ``Objective(CrossEntropy({SAID: 1.0}), Distillation(2.0))`` thus teaches the next token through what is said, and
    both the exits and the deeper layers to say what the model alone would have said.

    Parameters
    ----------
    model : transformers model for causal language modelling
    exits : iterable of int
        0-based layers.
    objective : Objective
    bf16 : bool, default False
        Compute in bfloat16 (autocast).

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import SAID, CrossEntropy, Distillation, Leaving, Objective
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> leaving = Leaving(model, [0, 2], Objective(CrossEntropy({SAID: 1.0}), Distillation(2.0)))
    >>> leaving(torch.randint(64, (2, 9))).shape
    torch.Size([])
    """

    def __init__(self, model: Any, exits: Iterable[int], objective: Objective, bf16: bool = False) -> None:
        super().__init__(model, exits, objective, None, bf16)

    def measured(self, ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and for `PASSED` and `SAID` [B * S] whether their token is that of full depth."""
        read = ids[:, :-1]
        with torch.no_grad():
            teacher = super().depths(read)
            left = self.draw(teacher, read.shape)
        return self.objective(self.student(read, left, teacher), ids[:, 1:].flatten(), None)

    def draw(self, teacher: dict[int, Depth], shape: torch.Size) -> Tensor:
        """The 0-based layer after which each token leaves.

        Parameters
        ----------
        teacher : dict of int to Depth
            States at the exits and at full depth, as :meth:`Joint.depths` returns them.
        shape : (int, int)
            Sequences and tokens of each.

        Returns
        -------
        Tensor
            [B, S] int64; the last layer where a token stays. Drawn from torch's default generator.
        """
        last = max(teacher)
        device = teacher[last].state.device
        open_ = torch.rand(shape[0], len(self.exits), device=device) < 0.5
        threshold = torch.rand(shape[0], 1, device=device) ** 3  # half of them below 1/8, where most tokens leave
        open_ &= torch.rand(shape[0], 1, device=device) >= STAY
        left = torch.full(tuple(shape), last, device=device)
        for k, exit in reversed(list(enumerate(self.exits))):  # of several that would do, the first counts
            rows = open_[:, k].nonzero()[:, 0]
            if len(rows):
                depth = teacher[exit]
                state = depth.state.view(*shape, -1)[rows].flatten(0, 1)
                goes = margins(depth._replace(state=state)).view(len(rows), -1) >= threshold[rows]
                left[rows] = torch.where(goes, exit, left[rows])
        return left

    def student(self, ids: Tensor, left: Tensor, teacher: dict[int, Depth]) -> dict[int, Depth]:
        """What the objective sees, [B * S, D] states by `PASSED`, `SAID` and full depth."""
        s, full = self.structure, teacher[max(teacher)]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            with frozen_after(s.layers, left), watch(s, self.exits) as states:
                said = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            which = torch.randint(len(self.exits), (ids.numel(), 1), device=ids.device)
            raw = states[self.exits[0]].flatten(0, 1)
            for k, exit in enumerate(self.exits[1:], 1):
                raw = torch.where(which == k, states[exit].flatten(0, 1), raw)
            passed = s.normalise(raw)
        head = (s.weight, getattr(s.head, "bias", None))
        dtype = full.state.dtype
        return {
            PASSED: Depth(raw, passed.to(dtype), *head),
            SAID: Depth(said, said.to(dtype), *head),
            FULL: full._replace(weight=full.weight.detach(), bias=None if full.bias is None else full.bias.detach()),
        }


@contextmanager
def frozen_after(layers: Iterable[nn.Module], left: Tensor) -> Iterator[None]:
    """Make decoder layers pass on the states of tokens that have left.

    Parameters
    ----------
    layers : iterable of nn.Module
        All decoder layers, in order.
    left : Tensor
        [B, S] int64, the 0-based layer after which each token leaves.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training.leaving import frozen_after
    >>> layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(3)]
    >>> for layer in layers:
    ...     _ = torch.nn.init.constant_(layer.weight, 2.0)
    >>> with torch.no_grad(), frozen_after(layers, torch.tensor([[0, 2]])):  # the first token leaves after layer 0
    ...     torch.nn.Sequential(*layers)(torch.ones(1, 2, 1)).flatten()
    tensor([2., 8.])
    """

    def freeze(layer: int) -> Any:
        runs = (left >= layer)[..., None]

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (torch.where(runs, output[0], before), *output[1:])
            return torch.where(runs, output, before)

        return hook

    handles = [layer.register_forward_hook(freeze(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def margins(depth: Depth) -> Tensor:
    """[N] difference of the two largest probabilities."""
    found = []
    for part in depth.state.split(ROWS):
        logits = F.linear(part, depth.weight.to(part.dtype)).float()
        top = (logits if depth.bias is None else logits + depth.bias).softmax(-1).topk(2).values
        found.append(top[:, 0] - top[:, 1])
    return torch.cat(found)
