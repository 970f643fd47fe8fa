"""Which tokens make up which words: what exits of taggers decide about.

A *word map* numbers the words of every row from 1; tokens of no word (``[CLS]``, ``[SEP]``, padding) have 0. Equal
numbers side by side are pieces of one word. Words are neighbours where no other token stands between them, so a window
over words crosses neither the end of a row nor a separator within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Pieces", "Words", "word_map", "words_of"]

Pieces = Literal["all", "first"]


def word_map(encoding: Any) -> Tensor:
    """The word map of what a fast tokenizer returned.

    Parameters
    ----------
    encoding : transformers.BatchEncoding
        Of one text or several, padded or alone.

    Returns
    -------
    Tensor
        [B, S] int64: from 1 upwards in every row, 0 for tokens of no word.

    Raises
    ------
    ValueError
        Where a tokenizer does not know words (one that is not fast), or rows are of different length.

    Examples
    --------
    >>> from transformers import BertTokenizerFast
    >>> pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "##a", "sings"]
    >>> tokenizer = BertTokenizerFast(vocab={piece: k for k, piece in enumerate(pieces)})
    >>> word_map(tokenizer(["Anna sings", "sings"], padding=True))
    tensor([[0, 1, 1, 2, 0],
            [0, 1, 0, 0, 0]])
    """
    if not getattr(encoding, "is_fast", False):
        raise ValueError(
            "word_map: expected what a fast tokenizer returned, which knows the words of its tokens, "
            f"got {type(encoding).__name__} without them: load the tokenizer with use_fast=True"
        )
    rows = []
    for k in range(len(encoding.encodings)):
        ids, parts = encoding.word_ids(k), encoding.sequence_ids(k)
        number, before, row = 0, None, []
        for word, part in zip(ids, parts, strict=True):
            if word is not None and (part, word) != before:
                number += 1
            before = None if word is None else (part, word)
            row.append(0 if word is None else number)
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        raise ValueError("word_map: expected rows of one length, got several: call the tokenizer with padding=True")
    return torch.tensor(rows, dtype=torch.int64)


@dataclass
class Words:
    """Tokens and words of some rows, one after the other, without padding; T tokens and W words.

    Attributes
    ----------
    place : Tensor
        [T] int64, where in the padded batch a token stands: row * S + position. Ascending.
    word : Tensor
        [T] int64, number of its word among the W, -1 for tokens of none.
    first : Tensor
        [W] int64, the first token of each word, among the T.
    row : Tensor
        [W] int64, row of each word.
    segment : Tensor
        [W] int64, ascending; words that follow each other without a token of no word between have the same.

    Examples
    --------
    >>> import torch
    >>> from exeunt.words import words_of
    >>> found = words_of(torch.tensor([[0, 1, 1, 2]]), None)  # a special token, a word of two pieces, another
    >>> len(found), found.first.tolist()
    (2, [1, 3])
    >>> rest = found.keep(torch.tensor([True, False, False, True]), torch.tensor([False, True]))
    >>> rest.place.tolist(), rest.first.tolist()
    ([0, 3], [1])
    """

    place: Tensor
    word: Tensor
    first: Tensor
    row: Tensor
    segment: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def keep(self, tokens: Tensor, words: Tensor) -> Words:
        """What is left with some tokens and the words that they belong to, [T] and [W] bool."""
        number = words.cumsum(0) - 1
        word = self.word[tokens]
        word = torch.where(word >= 0, number[word], word) if len(number) else word
        first = (tokens.cumsum(0) - 1)[self.first[words]]
        return Words(self.place[tokens], word, first, self.row[words], self.segment[words])


def words_of(words: Tensor, mask: Tensor | None) -> Words:
    """Tokens and words of a batch.

    Parameters
    ----------
    words : Tensor
        [B, S] integers, a word map.
    mask : Tensor or None
        [B, S], not 0 where a token counts; None where all do.

    Raises
    ------
    ValueError
        If the map does not belong to the mask: one sentence.

    Examples
    --------
    >>> found = words_of(torch.tensor([[0, 1, 1, 2, 0], [0, 1, 0, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]))
    >>> found.place.tolist(), found.word.tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7], [-1, 0, 0, 1, -1, -1, 2, -1])
    >>> found.first.tolist(), found.row.tolist(), found.segment.tolist()
    ([1, 3, 6], [0, 0, 1], [0, 0, 1])
    """
    batch, length = words.shape
    flat = words.reshape(-1)
    if mask is None:
        place = torch.arange(batch * length, device=words.device)
    else:
        counts = (mask != 0).reshape(-1)
        if bool((flat[~counts] > 0).any()):
            raise ValueError("attach: expected words that cover the text, got some where attention_mask is 0")
        place = counts.nonzero()[:, 0]
    number = flat[place]
    row = place // length
    in_word = number > 0
    before = torch.zeros_like(in_word)  # whether a token goes on with the word of the one before
    same_row = row[1:] == row[:-1]
    before[1:] = same_row & in_word[1:] & (number[1:] == number[:-1])
    starts = in_word & ~before
    first = starts.nonzero()[:, 0]
    word = torch.where(in_word, starts.cumsum(0) - 1, torch.full_like(number, -1))
    opens = starts.clone()  # a word opens a segment unless a token of a word stands before it in its row
    opens[1:] &= ~(same_row & in_word[:-1])
    segment = opens.cumsum(0)[first] - 1
    return Words(place, word, first, row[first], segment)
