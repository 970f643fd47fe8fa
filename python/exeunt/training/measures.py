"""What exits are worth on text that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt.heads import ExitHeads
from exeunt.training.terms import Depth

__all__ = ["judge", "summary"]

ROWS = 512  # whose logits exist at a time
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@torch.no_grad()
def judge(depths: Mapping[int, Depth], labels: Tensor | None, heads: ExitHeads | None) -> dict[int, dict[str, Tensor]]:
    """What every depth says of each of N tokens.

    Parameters
    ----------
    depths : Mapping[int, Depth]
        As `Joint.depths` and `Recorded.depths` return them.
    labels : Tensor, optional
        [N] int64.
    heads : ExitHeads, optional

    Returns
    -------
    dict
        By depth [N] tensors: ``agrees`` (with full depth), ``margin`` of the two largest probabilities, ``nats``
        (negative log-likelihood of the label, with labels), ``probe`` (at exits that have one).

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import Depth, judge
    >>> state, head = torch.eye(3), torch.eye(3)
    >>> depths = {1: Depth(state, state.roll(1, 0), head), 3: Depth(state, state, head)}
    >>> judge(depths, None, None)[1]["agrees"]
    tensor([False, False, False])
    """
    found: dict[int, dict[str, list[Tensor]]] = {depth: {} for depth in depths}
    count = len(next(iter(depths.values())).state)
    final = max(depths)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        logits = {}
        for e, d in depths.items():
            logits[e] = F.linear(d.state[rows], d.weight.to(d.state.dtype)).float()
            if d.bias is not None:
                logits[e] += d.bias
        tokens = logits[final].argmax(-1)
        for e, z in logits.items():
            (first, token), total = z.max(-1), z.logsumexp(-1)
            parts = {"agrees": token == tokens}
            if labels is not None:
                parts["nats"] = total - z.gather(1, labels[rows, None])[:, 0]
            second = z.scatter_(1, token[:, None], -torch.inf).amax(-1)  # topk takes longer than all else here
            parts["margin"] = (first - total).exp() - (second - total).exp()
            if heads is not None and e in heads and (probe := heads[e].probe) is not None:
                parts["probe"] = probe(depths[e].raw[rows])
            for name, part in parts.items():
                found[e].setdefault(name, []).append(part.cpu())
    return {e: {name: torch.cat(parts) for name, parts in by_name.items()} for e, by_name in found.items()}


def summary(judged: Iterable[dict[int, dict[str, Tensor]]]) -> dict[str, dict[str, Any]]:
    """Figures over what `judge` returned for the parts of a text.

    Returns
    -------
    dict
        By depth, as text for JSON: ``agreement``, ``perplexity`` and, for ``margin`` and ``probe``, by threshold the
        share of the tokens whose score exceeds it and their agreement.

    Raises
    ------
    ValueError
        If there are no tokens.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import summary
    >>> agrees = {1: {"agrees": torch.tensor([True, False])}, 3: {"agrees": torch.tensor([True, True])}}
    >>> summary([agrees])
    {'1': {'agreement': 0.5}, '3': {'agreement': 1.0}}
    """
    parts = list(judged)
    if not parts:
        raise ValueError("the data is too short: there are no held-out tokens to measure on")
    figures: dict[str, dict[str, Any]] = {}
    for depth in parts[0]:
        whole = {name: torch.cat([part[depth][name] for part in parts]) for name in parts[0][depth]}
        agrees = whole["agrees"].float()
        figure: dict[str, Any] = {"agreement": agrees.mean().item()}
        if "nats" in whole:
            figure["perplexity"] = math.exp(min(whole["nats"].double().mean().item(), 700.0))
        for name in ("margin", "probe"):
            if name in whole and depth != max(parts[0]):
                kept = {t: agrees[whole[name] > t] for t in THRESHOLDS}
                figure[name] = {
                    str(t): {"share": len(k) / len(agrees), "agreement": k.mean().item() if len(k) else None}
                    for t, k in kept.items()
                }
        figures[str(depth)] = figure
    return figures
