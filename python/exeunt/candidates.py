"""SpecEE's candidates: a few words that stand for the vocabulary while a token is on its way up.

A draft names them once a token; every exit reads the head's rows for these words alone (``columns`` of
:func:`exeunt.ops.exit_stats`). What a probe then looks at are their logits, their probabilities among themselves, and
how these have moved since the exit before (Xu et al., ISCA 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from exeunt.models import Structure

__all__ = ["Candidates", "among", "features", "over_exits"]


@dataclass(frozen=True)
class Candidates:
    """Where a token's candidates come from.

    Parameters
    ----------
    count : int, default 4
        How many, 2 to 8.
    draft : callable, optional
        ``draft(hidden)``: from the states [n, D] of tokens after the first exit's layer to ids [n, count] int64, for
        instance a head of your own. By default the words with the largest logits there: one read of the head.

    Examples
    --------
    >>> Candidates().count
    4
    """

    count: int = 4
    draft: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.count <= 8:
            raise ValueError(f"Candidates: count must lie in 2..8, got {self.count}")

    def drafted(self, hidden: Tensor, vocab: int) -> Tensor:
        """What the draft says of states, checked."""
        assert self.draft is not None
        ids = self.draft(hidden)
        expected = (len(hidden), self.count)
        if ids.shape != expected or ids.dtype != torch.int64:
            raise ValueError(f"draft must give int64 ids {list(expected)}, got {ids.dtype} {list(ids.shape)}")
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab):
            raise ValueError(f"draft must give ids in 0..{vocab - 1}, got {int(ids.min())}..{int(ids.max())}")
        return ids


def features(logits: Tensor, shown: Tensor) -> Tensor:
    """What a candidate probe reads, [n, 3 k].

    Parameters
    ----------
    logits : Tensor
        [n, k] of the candidates at this exit.
    shown : Tensor
        [n, k] their probabilities at the exit before, NaN where there was none.

    Examples
    --------
    >>> features(torch.ones(1, 2), torch.tensor([[0.75, 0.25]])).tolist()
    [[1.0, 1.0, 0.5, 0.5, -0.25, 0.25]]
    """
    probabilities = logits.float().softmax(-1)
    moved = torch.where(shown.isnan(), 0.0, probabilities - shown)
    return torch.cat((logits.float(), probabilities, moved), -1)


def among(label: Tensor, ids: Tensor) -> Tensor:
    """[n] bool, whether a label [n] is one of the candidates [n, k].

    Examples
    --------
    >>> among(torch.tensor([3, 5]), torch.tensor([[1, 3], [1, 3]]))
    tensor([ True, False])
    """
    return (label[:, None] == ids).any(-1)


@torch.no_grad()
def over_exits(structure: Structure, states: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of n tokens by the first exit's largest logits, and what every exit says of them.

    Parameters
    ----------
    structure : Structure
        Of the model.
    states : sequence of Tensor
        [n, D] for each exit: what goes into the model's last norm.
    count : int

    Returns
    -------
    ids : Tensor
        [n, count].
    logits : Tensor
        [n, E, count].
    predicted : Tensor
        [n, E] int64, what the whole head says.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.candidates import over_exits
    >>> from exeunt.models import discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> ids, logits, predicted = over_exits(discover(model), [torch.randn(3, 32) for _ in range(2)], count=4)
    >>> ids.shape, logits.shape, torch.equal(ids[:, 0], predicted[:, 0])  # the likeliest word comes first
    (torch.Size([3, 4]), torch.Size([3, 2, 4]), True)
    """
    first = structure.exit_stats(states[0], topk=count)
    assert first.topk_ids is not None and first.topk_logits is not None
    ids = first.topk_ids.clamp_min(0)
    logits, predicted = [first.topk_logits], [first.argmax]
    for state in states[1:]:
        logits.append(structure.candidate_logits(state, ids))
        predicted.append(structure.exit_stats(state).argmax)
    return ids, torch.stack(logits, 1), torch.stack(predicted, 1)
