"""CascadeBERT: rows that a small model is unsure of go on to a larger one (Li et al., Findings of EMNLP 2021).

The models are complete and separately trained; what a row costs is the sum over those that it went through. The
published code runs all models on all rows and counts what it could have saved; here the unsure rows alone go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exeunt import buckets
from exeunt.confidence import Confidence, ExitPoint, measure
from exeunt.heads import ExitHead
from exeunt.stats import ExitStats

__all__ = ["Cascade", "CascadeReport", "difficulty_inversion_score"]


@dataclass
class CascadeReport:
    """What a cascade did.

    Attributes
    ----------
    rows : tuple of int
        Rows that each model has run.
    layers : tuple of int
        Layers of each model.

    Examples
    --------
    >>> CascadeReport(rows=(10, 4), layers=(2, 12)).layers_per_row
    6.8
    """

    rows: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def layers_per_row(self) -> float:
        """Layers run for a row that came in, over all the models it went through; nan without rows."""
        total = sum(n * depth for n, depth in zip(self.rows, self.layers, strict=True))
        return total / self.rows[0] if self.rows[0] else float("nan")


class Cascade(nn.Module):
    """Classifiers from small to large; each answers the rows that it is sure of, the last one all that are left.

    Parameters
    ----------
    models : sequence of transformers models
        Sequence classifiers with one vocabulary and the same labels, two or more. One may have exits on it.
    thresholds : float or sequence of float
        For every model but the last: rows whose score reaches it are answered.
    confidence : str or Confidence, default "max_prob"
        A measure that reads logits.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from exeunt.cascade import Cascade
    >>> def bert(layers):
    ...     return BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=layers,
    ...         num_attention_heads=2, intermediate_size=16)).eval()
    >>> cascade = Cascade([bert(2), bert(4)], thresholds=1.0)  # nothing is ever that sure
    >>> cascade(input_ids=torch.tensor([[1, 2, 3]])).logits.shape, cascade.report().layers_per_row
    (torch.Size([1, 2]), 6.0)
    """

    def __init__(
        self,
        models: Sequence[Any],
        thresholds: float | Sequence[float],
        confidence: str | Confidence = "max_prob",
    ) -> None:
        super().__init__()
        if len(models) < 2:
            raise ValueError(f"Cascade: expected two models or more, got {len(models)}")
        self.models = nn.ModuleList(models)
        for what in ("num_labels", "vocab_size"):
            found = [getattr(m.config, what) for m in models]
            if len(set(found)) > 1:
                raise ValueError(f"Cascade: expected models of the same {what}, got {', '.join(map(str, found))}")
        several = isinstance(thresholds, Sequence)
        self.thresholds = tuple(thresholds) if isinstance(thresholds, Sequence) else (thresholds,) * (len(models) - 1)
        if several and len(self.thresholds) != len(models) - 1:
            raise ValueError(f"Cascade: expected {len(models) - 1} thresholds, got {len(self.thresholds)}")
        self.confidence = measure(confidence)
        if not self.confidence.reads_head or self.confidence.remembers:
            raise ValueError(f"Cascade: confidence must be a measure of one model's logits, got {self.confidence.name}")
        self._depths = tuple(int(m.config.num_hidden_layers) for m in models)
        self.reset_report()

    def reset_report(self) -> None:
        """Start counting anew."""
        self._rows = [0] * len(self.models)

    def report(self) -> CascadeReport:
        """Rows run by each model since the start or :meth:`reset_report`."""
        return CascadeReport(tuple(self._rows), self._depths)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Classify a batch.

        Parameters
        ----------
        input_ids, attention_mask : Tensor
            [B, S].
        **inputs
            What the models take beside them; tensors of B rows go along with their rows, and those of S tokens are
            cut like the ids, also where one row stands for all (position ids, say).

        Returns
        -------
        transformers' output of the first model
            ``logits`` [B, C] of the model that answered each row.

        Raises
        ------
        ValueError
            For an empty batch, or labels (a cascade has no loss).
        """
        if "labels" in inputs:
            raise ValueError("Cascade: expected no labels, since a cascade has no loss; train its models one by one")
        batch, length = input_ids.shape
        if not batch:
            raise ValueError("Cascade: expected at least one row, got an empty batch")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {"input_ids": input_ids, "attention_mask": mask, **inputs}
        out = rows = None
        for k, model in enumerate(self.models):
            found = model(**given)
            self._rows[k] += found.logits.shape[0]
            if out is None:
                out = found
            else:
                out.logits = out.logits.index_copy(0, rows, found.logits.to(out.logits.dtype))
            if k == len(self.models) - 1:
                break
            logits = found.logits.float()
            point = ExitPoint(logits, logits, ExitHead(), ExitStats.from_logits(logits), logits.shape[1], logits)
            unsure = (~(self.confidence.score(point) >= self.thresholds[k])).nonzero()[:, 0]
            if not len(unsure):
                break
            rows = unsure if rows is None else rows[unsure]
            longest = int(buckets.lengths(mask, batch, length, mask.device)[rows].max())
            taken = {"input_ids": input_ids, "attention_mask": mask, **inputs}
            given = {name: _taken(value, rows, (batch, length), longest) for name, value in taken.items()}
        return out


def _taken(value: Any, rows: Tensor, whole: tuple[int, int], longest: int) -> Any:
    """An input for some rows, without the padding that none of them needs."""
    batch, length = whole
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] not in (1, batch):
        return value
    if value.shape[0] == batch:
        value = value[rows]
    return value[:, :longest] if value.dim() > 1 and value.shape[1] == length else value


def difficulty_inversion_score(confidence: Tensor, difficulty: Tensor) -> float:
    """How well confidence ranks rows by difficulty (DIS, Li et al. 2021): 1 where every easier row is the surer one.

    Parameters
    ----------
    confidence : Tensor
        [n], larger is surer.
    difficulty : Tensor
        [n], larger is harder: for example 1 where a model that was trained on other data is wrong.

    Returns
    -------
    float
        The share of pairs of different difficulty in which the easier row has the larger confidence; ties are wrong.

    Raises
    ------
    ValueError
        For shapes that differ, or rows that are all of one difficulty.

    Examples
    --------
    >>> difficulty_inversion_score(torch.tensor([0.9, 0.6, 0.8]), torch.tensor([0, 0, 1]))
    0.5
    """
    if confidence.shape != difficulty.shape or confidence.dim() != 1:
        raise ValueError(
            f"difficulty_inversion_score: expected two tensors [n], got {[*confidence.shape]} and {[*difficulty.shape]}"
        )
    right = pairs = 0
    for c, d in zip(confidence.split(1024), difficulty.split(1024), strict=True):
        easier = d[:, None] < difficulty
        right += int((easier & (c[:, None] > confidence)).sum())
        pairs += int(easier.sum())
    if not pairs:
        raise ValueError("difficulty_inversion_score: expected rows of different difficulty, got one difficulty")
    return right / pairs
