"""Risk functions: losses within 0..1 of what early exit put out, unit by unit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from exeunt.calibration._checks import Array, array, same_shape

__all__ = ["bleu", "label_disagreement", "rouge_l", "token_disagreement"]


def label_disagreement(predicted: ArrayLike | torch.Tensor, expected: ArrayLike | torch.Tensor) -> Array:
    """1 where a prediction differs: from full depth's (disagreement) or from the truth (1 - accuracy).

    Parameters
    ----------
    predicted, expected : array
        [n] labels.

    Returns
    -------
    array
        [n] float64, 0 or 1.

    Examples
    --------
    >>> from exeunt.calibration import risks
    >>> risks.label_disagreement([1, 0, 2], [1, 1, 2])
    array([0., 1., 0.])
    """
    p, e = array("predicted", predicted, 1), array("expected", expected, 1)
    same_shape("predicted", p, "expected", e)
    return (p != e).astype(np.float64)


def token_disagreement(early: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> Array:
    """Share of positions at which two token sequences differ, one loss a prompt.

    Parameters
    ----------
    early, full : sequence of sequences of int
        New tokens with exits and at full depth, prompt by prompt. Positions that only the longer one has differ.

    Returns
    -------
    array
        [n] float64 within 0..1; two empty sequences agree.

    Examples
    --------
    >>> from exeunt.calibration import risks
    >>> risks.token_disagreement([[5, 6, 7], [1]], [[5, 9, 7], [1, 2]])
    array([0.33333333, 0.5       ])
    """
    _paired(early, full)

    def one(a: Sequence[int], b: Sequence[int]) -> float:
        longest = max(len(a), len(b))
        return 1 - sum(int(x) == int(y) for x, y in zip(a, b, strict=False)) / longest if longest else 0.0

    return np.array([one(a, b) for a, b in zip(early, full, strict=True)])


def rouge_l(early: Sequence[str], references: Sequence[str]) -> Array:
    """1 - ROUGE-L F1 of each text against its reference (or full depth's text), by the package rouge-score.

    Its own words are ASCII; here they are runs of letters, marks and digits of any script, and single characters where
    a script has no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer). Punctuation does not count, as
    ever.

    Parameters
    ----------
    early, references : sequence of str
        Texts, prompt by prompt.

    Returns
    -------
    array
        [n] float64 within 0..1; English words are stemmed. Equal texts have no loss, even empty ones.

    Raises
    ------
    ImportError
        Without rouge-score.

    Examples
    --------
    >>> from exeunt.calibration import risks
    >>> risks.rouge_l(["the cat sat", "no"], ["the cat sat down", "yes"]).round(3)
    array([0.143, 1.   ])
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as missing:
        raise ImportError("rouge_l needs rouge-score: pip install exeunt[calibrate]") from missing
    _paired(early, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words(DefaultTokenizer(use_stemmer=True)))
    pairs = zip(references, early, strict=True)
    return np.array([0.0 if a == b else 1 - scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])


class _Words:
    """rouge-score's tokenizer for any script; of ASCII text it makes the same words."""

    # Thai, Lao, Burmese, Khmer; kana, bopomofo and ideographs.
    SINGLE = re.compile(
        "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    )

    def __init__(self, ascii: Any) -> None:
        self.ascii = ascii  # of rouge-score

    def tokenize(self, text: str) -> list[str]:
        """Words of a text."""
        kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
        words = self.SINGLE.sub(r" \g<0> ", kept).split()
        return [own for word in words for own in (self.ascii.tokenize(word) if word.isascii() else (word,))]


def bleu(early: Sequence[str], references: Sequence[str]) -> Array:
    """1 - sentence BLEU of each text against its reference (or full depth's text), by the package sacrebleu.

    Parameters
    ----------
    early, references : sequence of str
        Texts, prompt by prompt.

    Returns
    -------
    array
        [n] float64 within 0..1; smoothed as sacrebleu does for sentences. Equal texts have no loss, even empty ones.

    Raises
    ------
    ImportError
        Without sacrebleu.

    Examples
    --------
    >>> from exeunt.calibration import risks
    >>> risks.bleu(["the cat sat on the mat"], ["the cat sat on the mat"]).round(3)
    array([0.])
    """
    try:
        from sacrebleu import sentence_bleu
    except ImportError as missing:
        raise ImportError("bleu needs sacrebleu: pip install exeunt[calibrate]") from missing
    _paired(early, references)
    pairs = zip(early, references, strict=True)
    return np.array([0.0 if a == b else 1 - sentence_bleu(a, [b]).score / 100 for a, b in pairs]).clip(0, 1)


def _paired(early: Sequence[object], other: Sequence[object]) -> None:
    if not len(early) or len(early) != len(other):
        raise ValueError(f"expected as many outputs as references and at least one, got {len(early)} and {len(other)}")
