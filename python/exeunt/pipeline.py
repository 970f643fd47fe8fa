"""transformers' text-classification pipeline on a model whose easy rows leave early: swapping takes one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from exeunt.attach import attach
from exeunt.calibration import Calibration
from exeunt.encoder import AttachedEncoder
from exeunt.recipes import Recipe
from exeunt.row_report import RowReport

__all__ = ["Pipeline", "pipeline"]

TASKS = ("text-classification", "sentiment-analysis")
MANY = 200  # texts from which on a bar shows how far it is


def pipeline(
    task: str,
    model: Any,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    batch_size: int = 32,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Pipeline:
    """Build what ``transformers.pipeline(task, model)`` builds, with exits on the model.

    Parameters
    ----------
    task : str
        ``"text-classification"`` or ``"sentiment-analysis"``.
    model : str, path or transformers model
        A sequence classifier.
    recipe : Recipe
        With ``ClassifierHeads``.
    tokenizer : str, path or tokenizer, optional
        By default that of the model's checkpoint.
    batch_size : int, default 32
        Texts run together; rows that leave make room for nothing, but cost nothing either.
    calibration : Calibration or path, optional
        As in :func:`exeunt.attach`.
    progress : bool, default True
        Show a bar on standard error for lists of 200 texts or more.
    **settings
        For transformers' pipeline (``device``, ``top_k``, ...).

    Returns
    -------
    Pipeline

    Raises
    ------
    ValueError
        One sentence: another task, a model that is no classifier, or what :func:`exeunt.attach` refuses.

    Examples
    --------
    >>> import exeunt, torch
    >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> from exeunt.policies import Threshold
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    >>> tokenizer = BertTokenizerFast(vocab={word: k for k, word in enumerate(words)}, model_max_length=8)
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=16, max_position_embeddings=8)).eval()
    >>> heads = ClassifierHeads({0: LinearHead(16, 2)})
    >>> recipe = exeunt.recipes.Recipe((0,), exeunt.confidence.measure("max_prob"), Threshold(0.5),
    ...                                exeunt.states.Drop(), heads)
    >>> classify = exeunt.pipeline("text-classification", model, recipe, tokenizer=tokenizer)
    >>> sorted(classify(["good", "bad bad"])[0])
    ['label', 'score']
    >>> classify.report().layers_per_row
    1.0
    """
    if task not in TASKS:
        raise ValueError(f"pipeline: task must be {' or '.join(TASKS)}, got {task!r}")
    try:
        import transformers
    except ImportError as missing:
        raise ImportError("pipeline needs transformers: pip install exeunt[hf]") from missing
    if not isinstance(model, (str, os.PathLike)) and not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"pipeline: expected a transformers model or its checkpoint, got a {type(model).__name__}")
    build: Any = transformers.pipeline
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.name_or_path
    stock = build(task, model=model, tokenizer=tokenizer, batch_size=batch_size, **settings)
    return Pipeline(stock, attach(stock.model, recipe, calibration=calibration), progress)


class Pipeline:
    """transformers' pipeline and the exits on its model; made by :func:`pipeline`.

    Attributes
    ----------
    stock : transformers.TextClassificationPipeline
        The pipeline that does the work.
    exits : AttachedEncoder
        What is on its model.
    """

    def __init__(self, stock: Any, exits: AttachedEncoder, progress: bool = True) -> None:
        self.stock, self.exits, self._progress = stock, exits, progress

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """What transformers' pipeline returns for the same inputs; texts that are too long are truncated.

        Parameters
        ----------
        inputs : str, dict, list of these, or an iterator
            Texts, or pairs as ``{"text": ..., "text_pair": ...}``. For an iterator (a generator, a file) results come
            as an iterator, batch after batch, while the inputs are read.
        **settings
            Such as ``top_k``.
        """
        settings.setdefault("truncation", True)
        if isinstance(inputs, list):
            if not inputs:
                return []
            if self._progress and len(inputs) >= MANY:
                return list(self._shown(inputs, settings))
        elif isinstance(inputs, Iterator):
            inputs = (text for text in inputs)  # transformers streams from generators alone
        return self.stock(inputs, **settings)

    def _shown(self, inputs: list[Any], settings: dict[str, Any]) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        results = self.stock((text for text in inputs), **settings)
        return iter(track(results, "Classifying", len(inputs), console=console, disable=not console.is_terminal))

    def report(self) -> RowReport:
        """What the exits did."""
        return self.exits.report()

    def detach(self) -> None:
        """Take the exits off; the pipeline goes on at full depth."""
        self.exits.detach()
