"""Recording a stock encoder: what its exit heads show after every layer, at full depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from exeunt.classifier_heads import META, ClassifierHeads, View
from exeunt.confidence import ExitPoint, measure
from exeunt.models import discover_encoder

__all__ = ["runner"]


def runner(
    model: Any, heads: ClassifierHeads, tokenizer: Callable[..., Mapping[str, Tensor]] | None = None
) -> Callable[[list[Any]], tuple[Tensor, dict[str, Tensor]]]:
    """A function for :func:`exeunt.evaluation.record`: logits and other scores of a classifier's exits.

    Parameters
    ----------
    model : nn.Module
        An encoder with a classification head, stock or of your own; nothing may be attached to it.
    heads : ClassifierHeads
        Its exit heads.
    tokenizer : callable, optional
        Of texts; without one a unit is a sequence of token ids, and padding is 0.

    Returns
    -------
    callable
        Texts, or sequences of ids -> logits [b, E + 1, C] and scores [b, E + 1], which are NaN at full depth. Its
        attribute ``heads`` says whose they are.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=16, num_labels=2)).eval()
    >>> logits, scores = runner(model, ClassifierHeads({0: LinearHead(16, 2)}))([[5, 6, 7], [8, 9]])
    >>> logits.shape, list(scores)
    (torch.Size([2, 2, 2]), ['saturation'])
    """
    structure = discover_encoder(model)

    @torch.no_grad()
    def run(units: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = _padded(units) if tokenizer is None else tokenizer(units, padding=True, return_tensors="pt")
        inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs.items()}
        entered: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            for layer in dict.fromkeys(structure.layers)
        ]
        try:
            out = model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        full = out if isinstance(out, Tensor) else out.logits
        return _exits(heads, entered, inputs.get("attention_mask"), full)

    run.heads = heads  # type: ignore[attr-defined]
    return run


def _exits(
    heads: ClassifierHeads, entered: Sequence[Tensor], mask: Tensor | None, full: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and scores of all exits from what entered each layer."""
    memory: dict[str, Tensor] = {}
    logits, nothing = [], torch.full((len(full),), torch.nan)
    names = [
        "saturation",
        *(name for name in ("probe", "meta") if all(getattr(heads[e], name) is not None for e in heads)),
    ]
    scores: dict[str, list[Tensor]] = {name: [] for name in names}
    for layer, (before, after) in enumerate(pairwise(entered)):
        view = View(after, mask, layer, memory)
        if heads.observes:
            heads.observe(view)
        if layer in heads:
            head = heads[layer]
            judged = head.judge(view)
            logits.append(judged.logits.float())
            state, previous = head.pooled(view), head.pooled(view._replace(hidden=before))
            for name in names:
                if name == "meta":
                    state = head.meta.seen(view, judged, (layer + 1) / len(entered))
                own = META if name == "meta" else measure(name)
                scores[name].append(own.score(ExitPoint(state, previous, head, judged.stats)).float())
    found = {name: torch.stack([*values, nothing], 1) for name, values in scores.items()}
    return torch.stack([*logits, full.float()], 1), found


def _padded(units: list[Sequence[int]]) -> dict[str, Tensor]:
    longest = max(map(len, units))
    ids, mask = torch.zeros(len(units), longest, dtype=torch.int64), torch.zeros(len(units), longest, dtype=torch.int64)
    for i, unit in enumerate(units):
        ids[i, : len(unit)], mask[i, : len(unit)] = torch.as_tensor(unit), 1
    return {"input_ids": ids, "attention_mask": mask}
