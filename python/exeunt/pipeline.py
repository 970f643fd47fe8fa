"""transformers' classification pipelines on models whose easy rows or words leave early: swapping takes one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from exeunt.attach import attach
from exeunt.calibration import Calibration
from exeunt.encoder import AttachedEncoder
from exeunt.policies import WordPolicy
from exeunt.recipes import Recipe
from exeunt.token_encoder import AttachedTagger
from exeunt.words import word_map

__all__ = ["Pipeline", "TaggingPipeline", "pipeline"]

TASKS = ("text-classification", "sentiment-analysis")
TAGGING = ("token-classification", "ner")
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
        ``"text-classification"`` or ``"sentiment-analysis"``; ``"token-classification"`` or ``"ner"``, whose tokenizer
        has to be a fast one.
    model : str, path or transformers model
        A sequence classifier, or a tagger.
    recipe : Recipe
        With ``ClassifierHeads``; for a tagger one over words (``recipes.tokee``, ``recipes.sentee``).
    tokenizer : str, path or tokenizer, optional
        By default that of the model's checkpoint.
    batch_size : int, default 32
        Texts run together; rows that leave make room for nothing, but cost nothing either.
    calibration : Calibration or path, optional
        As in :func:`exeunt.attach`.
    progress : bool, default True
        Show a bar on standard error for lists of 200 texts or more.
    **settings
        For transformers' pipeline (``device``, ``top_k``, ``aggregation_strategy``, ...).

    Returns
    -------
    Pipeline or TaggingPipeline

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
    if task not in (*TASKS, *TAGGING):
        raise ValueError(f"pipeline: task must be {', '.join(TASKS)}, {' or '.join(TAGGING)}, got {task!r}")
    if task in TAGGING and not isinstance(recipe.policy, WordPolicy):
        raise ValueError(
            f"pipeline: {task} expects a recipe over words, as recipes.tokee or recipes.sentee, "
            f"got one with {type(recipe.policy).__name__}"
        )
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
    if task in TAGGING:
        if not stock.tokenizer.is_fast:
            raise ValueError(
                f"pipeline: {task} expects a fast tokenizer, which knows the words of its tokens, "
                f"got {type(stock.tokenizer).__name__}"
            )
        stock.tokenizer = _WithWords(stock.tokenizer)
        return TaggingPipeline(stock, AttachedTagger(stock.model, recipe, calibration), progress)
    return Pipeline(stock, attach(stock.model, recipe, calibration=calibration), progress)


class _WithWords:
    """A tokenizer whose results hold the word map as well, so that it goes to the model along with the ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.plain = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoding = self.plain(*args, **kwargs)
        encoding["words"] = word_map(encoding)
        return encoding

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.plain, name)


class Pipeline:
    """transformers' pipeline and the exits on its model; made by :func:`pipeline`.

    Attributes
    ----------
    stock : transformers.TextClassificationPipeline
        The pipeline that does the work.
    exits : AttachedEncoder
        What is on its model.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    >>> tokenizer = BertTokenizerFast(vocab={word: k for k, word in enumerate(words)}, model_max_length=8)
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=16, max_position_embeddings=8)).eval()
    >>> recipe = exeunt.recipes.shallow_deep(0.5, heads=ClassifierHeads({e: LinearHead(16, 2) for e in range(2)}))
    >>> classify = exeunt.pipeline("text-classification", model, recipe, tokenizer=tokenizer)
    >>> len(list(classify(text for text in ("good", "bad", "good good"))))
    3
    >>> classify.report().histogram
    {0: 3}
    >>> classify.detach()
    """

    SETTINGS: ClassVar[dict[str, Any]] = {"truncation": True}

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
        settings = {**self.SETTINGS, **settings}
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

    def report(self) -> Any:
        """What the exits did: a :class:`exeunt.row_report.RowReport`, or that of the tagger's words."""
        return self.exits.report()

    def detach(self) -> None:
        """Take the exits off; the pipeline goes on at full depth."""
        self.exits.detach()


class TaggingPipeline(Pipeline):
    """transformers' token classification and the exits on its model; made by :func:`pipeline`.

    Results, aggregation strategies and the other settings are those of transformers.

    Attributes
    ----------
    stock : transformers.TokenClassificationPipeline
        The pipeline that does the work.
    exits : AttachedTagger
        What is on its model.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "sings"]
    >>> tokenizer = BertTokenizerFast(vocab={word: k for k, word in enumerate(words)}, model_max_length=8)
    >>> model = BertForTokenClassification(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=16, max_position_embeddings=8)).eval()
    >>> recipe = exeunt.recipes.tokee(1.0, heads=ClassifierHeads({e: LinearHead(16, 2) for e in range(2)}))
    >>> tag = exeunt.pipeline("ner", model, recipe, tokenizer=tokenizer)
    >>> [found["word"] for found in tag("Ann sings")]
    ['ann', 'sings']
    >>> "left after 1 of 3 layers: 2 of 2 tokens" in tag.html("Ann sings")
    True
    """

    SETTINGS: ClassVar[dict[str, Any]] = {}
    exits: AttachedTagger

    def html(self, texts: str | list[str], title: str = "exeunt") -> str:
        """A page on which every word stands on the colour of the layer at which it halted.

        Parameters
        ----------
        texts : str or list of str
            Run in one batch.
        title : str, default "exeunt"
        """
        from exeunt.picture import tagged

        texts = [texts] if isinstance(texts, str) else texts
        coded = self.stock.tokenizer(
            texts, padding=True, truncation=True, max_length=self.exits.structure.longest, return_tensors="pt",
            return_offsets_mapping=True,
        )  # fmt: skip
        offsets, words = coded.pop("offset_mapping").tolist(), coded["words"]
        with self.stock.device_placement(), torch.no_grad():
            self.stock.model(**{name: t.to(self.stock.model.device) for name, t in coded.items()})
        depths = self.exits.depths
        assert depths is not None
        spans = [
            [(*offsets[r][t], int(depths[r, t]) + 1) for t in words[r].nonzero()[:, 0].tolist()]
            for r in range(len(texts))
        ]
        return tagged(texts, spans, self.exits.depth, title)
