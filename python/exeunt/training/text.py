"""Token data: rows of a long text, in an order that is a function of the seed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Windows", "tokenised"]

HELD_OUT = 10  # every so-manieth row


def tokenised(tokenizer: Any, texts: list[str], length: int, tokens: int | None = None) -> tuple[Any, Any]:
    """Rows to train on and held-out ones.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    texts : list of str
        Read one after the other, a blank line between them.
    length : int
        Tokens that are read in a row.
    tokens : int, optional
        Read so many at most; by default all.

    Returns
    -------
    train, held_out : numpy.ndarray
        [R, length + 1] int64. Rows overlap by the one token that ends the one and begins the next; every tenth is held
        out.

    Raises
    ------
    ValueError
        If the text does not fill ten rows.

    Examples
    --------
    >>> from exeunt import small_lm
    >>> from exeunt.training import tokenised
    >>> train, held_out = tokenised(small_lm.load()[1], ["A text of some length. " * 40], length=16)
    >>> train.shape[1], len(held_out) > 0
    (17, True)
    """
    ids: list[int] = []
    for text in texts:
        if tokens is not None and len(ids) > tokens:
            break
        ids += tokenizer(text + "\n\n", verbose=False).input_ids
    count = (min(len(ids), tokens or len(ids)) - 1) // length
    if count < HELD_OUT:
        raise ValueError(f"the data is too short: expected {HELD_OUT} rows of {length} tokens and one, got {len(ids)}")
    rows = np.stack([np.array(ids[k * length : (k + 1) * length + 1]) for k in range(count)])
    held_out = np.arange(count) % HELD_OUT == HELD_OUT // 2
    return rows[~held_out], rows[held_out]


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> Any:
    """The order of `count` things in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def take(count: int, start: int, size: int, seed: int) -> list[tuple[int, int]]:
    """Epoch and index of `size` things from the `start`-th on, in an endless stream of shuffled epochs over `count`."""
    places = (divmod(k, count) for k in range(start, start + size))
    return [(epoch, int(permutation(count, seed, epoch)[k])) for epoch, k in places]


class Windows:
    """Batches of windows on a text: ``windows(step)`` is int64 [batch, length + 1].

    Every epoch cuts the text at other places, so that what is learnt does not depend on where a window began.

    Parameters
    ----------
    tokens : numpy.ndarray
        [N] integers, memory-mapped if you like.
    length : int
        Tokens that are predicted in a window.
    batch : int
        Windows of a step.
    seed : int, default 0

    Raises
    ------
    ValueError
        If the text does not fill a batch.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt.training import Windows
    >>> windows = Windows(np.arange(100), length=8, batch=2)
    >>> windows(0).shape, bool((windows(3) == windows(3)).all())
    (torch.Size([2, 9]), True)
    """

    def __init__(self, tokens: Any, length: int, batch: int, seed: int = 0) -> None:
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.count = (len(tokens) - 1) // length - 1  # one fewer, so that windows can be shifted
        if self.count < batch:
            needed = (batch + 1) * length + 1
            raise ValueError(f"the data is too short: {batch} rows of {length} need {needed} tokens, got {len(tokens)}")

    def __call__(self, step: int) -> Tensor:
        """The batch of a 0-based step."""
        rows = []
        for epoch, k in take(self.count, step * self.batch, self.batch, self.seed):
            shift = int(np.random.default_rng((self.seed, epoch, 1)).integers(self.length))
            start = k * self.length + shift
            rows.append(np.asarray(self.tokens[start : start + self.length + 1], dtype=np.int64))
        return torch.from_numpy(np.stack(rows))
