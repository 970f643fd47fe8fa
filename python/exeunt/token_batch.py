"""The tokens of one forward of a tagger: which still run, which have halted, and what those answered."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.models.token_layers import TokenLayer, Tokens
from exeunt.policies import State, keep
from exeunt.words import Pieces, words_of

__all__ = ["TokenForward"]


class TokenForward:
    """One forward: the stock layers run until the first word halts, then layers in parts on tokens without padding.

    Parameters
    ----------
    words : Tensor
        [B, S] word map.
    mask : Tensor or None
        [B, S], not 0 where a token counts.
    depth : int
        Layers L.

    Examples
    --------
    >>> import torch
    >>> from exeunt.token_batch import TokenForward
    >>> run = TokenForward(torch.tensor([[0, 1, 2, 2]]), None, depth=4)  # a special token, a word, one of two pieces
    >>> leave, label = torch.tensor([False, True]), torch.tensor([0, 2])
    >>> run.halt(leave, torch.randn(4, 3), label, layer=1, hidden=torch.randn(4, 8), pieces="all")
    >>> run.depth, run.tokens.active
    (tensor([3, 3, 1, 1]), tensor([0, 1]))
    """

    logits: Tensor  # [B*S, C] of tokens that halted, zeros for the others
    final: Tensor  # [B*S, D] states of rows that ended
    hidden: Tensor  # [T, D] of the rows that run, once a word has halted
    before: Tensor | None = None  # [B, S, D], later [T, D]: what the last norm of the last layer read
    tokens: Tokens  # those of the rows that run

    def __init__(self, words: Tensor, mask: Tensor | None, depth: int) -> None:
        self.started = time.perf_counter()
        self.size = batch, length = (words.shape[0], words.shape[1])
        self.words = words_of(words, mask)
        place = self.words.place
        self.counted, self.firsts = len(place), place[self.words.first]
        self.padded = len(place) < batch * length
        self.next = self.returned = self.layer_tokens = self.key_tokens = self.checks = 0
        self.whole = True  # no word has halted
        self.judged = False
        self.halted = torch.zeros(len(self.words), dtype=torch.bool, device=words.device)
        self.label = torch.full_like(self.words.first, -1)  # of words that have halted
        self.state: State | None = None
        self.depth = torch.full((batch * length,), -1, dtype=torch.int64, device=words.device)
        self.depth[place] = depth - 1
        self.active = torch.ones(len(place), dtype=torch.bool, device=words.device)

    def flat(self, padded: Tensor) -> Tensor:
        """[T, D] of the tokens that count out of [B, S, D]."""
        whole = padded.flatten(0, 1)
        return whole.index_select(0, self.words.place) if self.padded else whole

    def halt(self, leave: Tensor, logits: Tensor, label: Tensor, layer: int, hidden: Tensor, pieces: Pieces) -> None:
        """Words halt, and rows end of which no word goes on.

        Parameters
        ----------
        leave : Tensor
            [W] bool.
        logits : Tensor
            [T, C] of this exit.
        label : Tensor
            [W] int64 of this exit.
        layer : int
        hidden : Tensor
            [T, D] states after it.
        pieces : {"all", "first"}
        """
        if self.judged and not bool(leave.any()):
            return  # rows without a word have ended at the first exit
        self.judged = True
        words, batch = self.words, self.size[0]
        self.halted = self.halted | leave
        self.label = torch.where(leave, label, self.label)
        row = words.place // self.size[1]
        ended = torch.bincount(words.row[~self.halted], minlength=batch) == 0  # also rows without a word
        over = ended[row]
        stop = over.clone()
        if pieces == "first":
            stop[words.first[leave]] = True
        elif len(words):
            stop |= (words.word >= 0) & leave[words.word.clamp_min(0)]
        stop &= self.active
        stopping = stop.nonzero()[:, 0]
        if not len(stopping):
            return
        if self.whole:
            self._unpad(hidden, logits)
        places = words.place[stopping]
        self.logits.index_copy_(0, places, logits.index_select(0, stopping).to(self.logits.dtype))
        self.depth.index_fill_(0, places, layer)
        self.active = self.active & ~stop
        if bool(over.any()):
            self._end_rows(over, ended)
        row = self.words.place // self.size[1]
        bounds = F.pad(torch.unique_consecutive(row, return_counts=True)[1].cumsum(0), (1, 0))
        active = None if bool(self.active.all()) else self.active.nonzero()[:, 0]
        self.tokens = Tokens(row, self.words.place % self.size[1], bounds, active)

    def _unpad(self, hidden: Tensor, logits: Tensor) -> None:
        """From now on there is no padding."""
        self.whole = False
        self.hidden = hidden if self.padded else hidden.clone()
        if self.before is not None:
            self.before = self.flat(self.before).clone()
        total = self.size[0] * self.size[1]
        self.logits = logits.new_zeros(total, logits.shape[1])
        self.final = hidden.new_zeros(total, hidden.shape[1])

    def _end_rows(self, over: Tensor, ended: Tensor) -> None:
        """Rows end: their tokens are no longer seen."""
        words = self.words
        self.final.index_copy_(0, words.place[over], self.hidden[over])
        stays = ~over
        of_words = ~ended[words.row]
        self.hidden, self.active = self.hidden[stays], self.active[stays]
        if self.before is not None:
            self.before = self.before[stays]
        self.words = words.keep(stays, of_words)
        self.halted, self.label = self.halted[of_words], self.label[of_words]
        if self.state is not None:
            self.state = keep(self.state, of_words)

    @property
    def runs(self) -> bool:
        """Whether any row still runs."""
        return self.whole or len(self.hidden) > 0

    def run(self, layer: TokenLayer, arguments: dict[str, Any]) -> None:
        """A layer in parts, on the active tokens of the rows that run."""
        tokens = self.tokens
        out, before = layer(self.hidden, arguments, tokens)
        self.layer_tokens += len(out)
        self.key_tokens += len(self.hidden) - len(out)
        if tokens.active is None:
            self.hidden = out
            if self.before is not None:
                self.before = before
            return
        self.hidden.index_copy_(0, tokens.active, out)
        if self.before is not None and layer.norm is not None:
            self.before.index_copy_(0, tokens.active, before)
            frozen = tokens.once("frozen", lambda: (~self.active).nonzero()[:, 0])
            self.hidden.index_copy_(0, frozen, layer.norm(self.before.index_select(0, frozen)))

    def gathered(self) -> Tensor:
        """After the last layer: states [B, S, D] of all tokens in their places, zeros where there is padding."""
        self.final.index_copy_(0, self.words.place, self.hidden)
        return self.final.unflatten(0, self.size)

    def answered(self, out: Tensor, last: int) -> Tensor:
        """[B, S, C]: the model's logits, those of their exit for tokens that halted, zeros for padding."""
        own = (self.depth == last).unflatten(0, self.size)[..., None]
        return torch.where(own, out, self.logits.to(out.dtype).unflatten(0, self.size))
