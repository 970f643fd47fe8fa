"""Risk functions: losses within 0..1 of what early exit put out, unit by unit."""

from __future__ import annotations

from collections.abc import Sequence

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

    Parameters
    ----------
    early, references : sequence of str
        Texts, prompt by prompt.

    Returns
    -------
    array
        [n] float64 within 0..1; words are stemmed.

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
    except ImportError as missing:
        raise ImportError("rouge_l needs rouge-score: pip install exeunt[calibrate]") from missing
    _paired(early, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, early, strict=True)
    return np.array([1 - scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])


def bleu(early: Sequence[str], references: Sequence[str]) -> Array:
    """1 - sentence BLEU of each text against its reference (or full depth's text), by the package sacrebleu.

    Parameters
    ----------
    early, references : sequence of str
        Texts, prompt by prompt.

    Returns
    -------
    array
        [n] float64 within 0..1; smoothed as sacrebleu does for sentences.

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
    scores = [sentence_bleu(text, [reference]).score for text, reference in zip(early, references, strict=True)]
    return (1 - np.array(scores) / 100).clip(0, 1)  # an exact match scores 100.00000000000004


def _paired(early: Sequence[object], other: Sequence[object]) -> None:
    if not len(early) or len(early) != len(other):
        raise ValueError(f"expected as many outputs as references and at least one, got {len(early)} and {len(other)}")
