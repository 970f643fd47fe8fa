"""Training the exits of a tagger: first at every depth, then as it will run, with words that have halted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt.classifier_heads import ClassifierHeads, View
from exeunt.models.encoder_structure import discover_encoder
from exeunt.models.structure import evaluating
from exeunt.models.token_layers import token_layers
from exeunt.policies.words import window_min
from exeunt.states import Freeze
from exeunt.stats import ExitStats
from exeunt.training.leaving import frozen_after
from exeunt.training.modules import watch
from exeunt.training.objectives import IGNORED
from exeunt.training.terms import depth_weights
from exeunt.words import Words, words_of

__all__ = ["SelfSampling", "Tagging"]


@dataclass(frozen=True)
class SelfSampling:
    """TOKEE's second stage: words halt in training where the model of the first stage would let them halt.

    Every text draws a window and a bound for the doubt of its words. With the sandwich rule the first text of a batch
    has the smallest window, the second the largest bound, and the next four run at full depth.

    Parameters
    ----------
    windows : tuple of int, default (5, 7, 9, 11, 13, 15)
        To draw from, each odd.
    delta : float, default 0.25
        Largest bound for the normalised entropy.
    sandwich : bool, default True

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import SelfSampling
    >>> _ = torch.manual_seed(0)
    >>> window, delta = SelfSampling().draw(8)
    >>> int(window[0]), round(float(delta[1]), 2), delta[2:6].tolist()
    (5, 0.25, [0.0, 0.0, 0.0, 0.0])
    """

    windows: tuple[int, ...] = (5, 7, 9, 11, 13, 15)
    delta: float = 0.25
    sandwich: bool = True

    def __post_init__(self) -> None:
        wrong = [w for w in self.windows if w < 1 or not w % 2]
        if wrong or not self.windows:
            raise ValueError(f"SelfSampling: windows must be odd, got {list(self.windows)}")
        if not 0 < self.delta <= 1:
            raise ValueError(f"SelfSampling: delta must lie in 0..1, got {self.delta}")

    def draw(self, rows: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Window and bound of each text, [B] each, from torch's default generator."""
        window = torch.tensor(self.windows, device=device)[torch.randint(len(self.windows), (rows,), device=device)]
        delta = self.delta * torch.rand(rows, device=device)
        if self.sandwich:
            window[:1] = min(self.windows)
            delta[1:2] = self.delta
            delta[2:6] = 0.0
        return window, delta

    def halts(self, doubts: dict[int, Tensor], words: Words, window: Tensor, delta: Tensor, last: int) -> Tensor:
        """[W] the layer after which each word halts; ``last`` where it does not.

        Parameters
        ----------
        doubts : dict of int to Tensor
            [W] normalised entropy by exit.
        words : Words
        window, delta : Tensor
            As drawn, one a text.
        last : int
        """
        left = torch.full_like(words.row, last)
        own, bound = window[words.row], delta[words.row]
        for layer in sorted(doubts, reverse=True):
            worst = torch.empty_like(doubts[layer])
            for size in own.unique().tolist():
                worst = torch.where(own == size, -window_min(-doubts[layer], words.segment, size), worst)
            left = torch.where(worst < bound, layer, left)
        return left


class Tagging(nn.Module):
    """A tagger with an exit head at several layers, trained on labelled tokens.

    ``tagging((ids, mask, words, labels))`` takes [B, S] integers each (a word map, :mod:`exeunt.words`; -100 for tokens
    without a label) and returns the sum over depths of depth * cross-entropy, divided by the sum of the depths; with
    `sampling` a depth counts those words alone that have not halted before it. What of it is trained,
    ``requires_grad`` says.

    Parameters
    ----------
    model : transformers model for token classification
    heads : ClassifierHeads
        One for each exit.
    sampling : SelfSampling, optional
        The second stage.
    sampler : Tagging, optional
        For the second stage: a copy of what the first stage ended with, whose doubts decide where words halt.
    state : Freeze, default Freeze("post")
        What is frozen of a word that halts.
    flood : float, optional
        The loss becomes its distance to this (TOKEE: to that of the first stage).
    bf16 : bool, default False
        Compute in bfloat16 (autocast); parameters stay as they are.

    Examples
    --------
    >>> import copy, torch
    >>> from transformers import BertConfig, BertForTokenClassification
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> from exeunt.training import SelfSampling, Tagging
    >>> model = BertForTokenClassification(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_labels=3,
    ...                                               num_attention_heads=2, intermediate_size=32))
    >>> first = Tagging(model, ClassifierHeads({e: LinearHead(16, 3) for e in (0, 1)}))
    >>> ids, mask = torch.randint(64, (8, 5)), torch.ones(8, 5, dtype=torch.int64)
    >>> words = torch.tensor([[0, 1, 2, 2, 0]]).expand(8, -1)
    >>> batch = (ids, mask, words, ids % 3)
    >>> second = Tagging(model, first.heads, sampling=SelfSampling(), sampler=copy.deepcopy(first))
    >>> first(batch).shape, second(batch).shape
    (torch.Size([]), torch.Size([]))
    """

    def __init__(
        self,
        model: Any,
        heads: ClassifierHeads,
        *,
        sampling: SelfSampling | None = None,
        sampler: Tagging | None = None,
        state: Freeze | None = None,
        flood: float | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if (sampling is None) != (sampler is None):
            raise ValueError("Tagging: expected a sampler along with sampling, and none without, got one of them")
        self.model, self.heads, self.sampling, self.flood, self.bf16 = model, heads, sampling, flood, bf16
        self.state = state or Freeze()
        self.structure = discover_encoder(model, tokens=True)
        self.last = len(self.structure.layers) - 1
        self.weights = depth_weights("depth", [*heads, self.last])
        self.sampler = None if sampler is None else sampler.requires_grad_(False)
        self._norms = [parts.norm for parts in token_layers(self.structure)] if self.state.norm == "pre" else []

    def logits(self, ids: Tensor, mask: Tensor) -> dict[int, Tensor]:
        """[B, S, C] at every exit and at full depth."""
        found = {}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            with watch(self.structure, self.heads) as states:
                out = self.model(input_ids=ids, attention_mask=mask)
            for layer in self.heads:
                view = View(states[layer].flatten(0, 1)[:, None], None, layer, {})
                found[layer] = self.heads[layer](view).unflatten(0, ids.shape)
        return {**found, self.last: out if isinstance(out, Tensor) else out.logits}

    @torch.no_grad()
    def doubts(self, ids: Tensor, mask: Tensor, words: Words) -> dict[int, Tensor]:
        """[W] normalised entropy of every word at every exit."""
        with evaluating(self):
            found = self.logits(ids, mask)
        at = words.place[words.first]
        stats = {e: ExitStats.from_logits(found[e].flatten(0, 1)[at].float()) for e in self.heads}
        return {e: s.normalized_entropy(found[e].shape[-1]) for e, s in stats.items()}

    def forward(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The loss."""
        ids, mask, words, labels = batch
        left = None
        if self.sampling is None:
            found = self.logits(ids, mask)
        else:
            assert self.sampler is not None
            flat = words_of(words, mask)
            window, delta = self.sampling.draw(len(ids), ids.device)
            halts = self.sampling.halts(self.sampler.doubts(ids, mask, flat), flat, window, delta, self.last)
            left = torch.full(ids.shape, self.last, device=ids.device)
            in_word = flat.word >= 0
            left.view(-1)[flat.place[in_word]] = halts[flat.word[in_word]]
            with self._freezing(left):
                found = self.logits(ids, mask)
        loss = ids.new_zeros((), dtype=torch.float32)
        for depth, weight in self.weights.items():
            counted = labels if left is None else labels.masked_fill(left < depth, IGNORED)
            if bool((counted != IGNORED).any()):
                loss = loss + weight * F.cross_entropy(found[depth].flatten(0, 1).float(), counted.flatten())
        return loss if self.flood is None else (loss - self.flood).abs()

    @contextmanager
    def _freezing(self, left: Tensor) -> Iterator[None]:
        """Later layers pass on the states of tokens that have halted, as they will when the tagger runs."""
        if self.state.norm == "post" or self._norms[0] is None:
            with frozen_after(self.structure.layers, left):
                yield
            return
        before: dict[str, Tensor] = {}

        def note(layer: int) -> Any:
            runs = (left >= layer)[..., None]

            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
                before["norm"] = args[0] if layer == 0 else torch.where(runs, args[0], before["norm"])
                return (before["norm"],)

            return hook

        handles = [norm.register_forward_pre_hook(note(i)) for i, norm in enumerate(self._norms)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
