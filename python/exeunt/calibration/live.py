"""Losses of a language model's exits from live runs: each candidate threshold decodes each text.

Replaying recorded scores is not exact for a language model: what a token left behind in skipped layers changes the
scores of later ones. So candidates are run, from safe to loose, texts in batches; equal seeds give equal losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exeunt.attach import attach
from exeunt.calibration import risks
from exeunt.calibration._checks import Array
from exeunt.policies import Threshold
from exeunt.recipes import Recipe

__all__ = ["RISKS", "Forced", "Live", "compared", "live_losses", "units", "until_end"]

RISKS = {
    "next-token": "share of a text's tokens after which another one than at full depth would be said",
    "token": "share of the generated tokens that differ from those generated at full depth",
    "rouge-l": "1 - ROUGE-L of the generated text against that of full depth",
    "bleu": "1 - BLEU of the generated text against that of full depth",
}


class Live(NamedTuple):
    """What live runs found.

    Attributes
    ----------
    losses : array
        [K, n] float64 within 0..1, by candidate and text.
    layers : list of float
        [K] layers run for a token, on average.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt.calibration.live import Live
    >>> live = Live(np.array([[0.0, 0.0], [0.25, 0.5]]), layers=[3.5, 2.0])
    >>> for threshold, losses, layers in zip([0.9, 0.5], live.losses, live.layers):
    ...     print(f"{threshold}: risk {losses.mean()}, {layers} layers a token")
    0.9: risk 0.0, 3.5 layers a token
    0.5: risk 0.375, 2.0 layers a token
    """

    losses: Array
    layers: list[float]


def units(ids: Any, length: int, count: int, seed: int = 0) -> Array:
    """Cut a long text into pieces and draw some of them, in random order.

    Parameters
    ----------
    ids : array
        [N] token ids.
    length : int
        Tokens of a piece.
    count : int
        Pieces to draw.
    seed : int, default 0

    Returns
    -------
    array
        [count, length] int64; no token is in two of them.

    Raises
    ------
    ValueError
        If the text is too short, with what it has.

    Examples
    --------
    >>> from exeunt.calibration.live import units
    >>> units(range(10), length=3, count=2).tolist()
    [[6, 7, 8], [0, 1, 2]]
    """
    x = np.asarray(ids, dtype=np.int64)
    pieces = len(x) // length
    if pieces < count:
        raise ValueError(
            f"the data is too short: expected {count} pieces of {length} tokens, got {len(x)} tokens ({pieces} pieces)"
        )
    chosen = np.random.default_rng(seed).permutation(pieces)[:count]
    return x[: pieces * length].reshape(pieces, length)[chosen]


@torch.no_grad()
def live_losses(
    model: Any,
    recipe: Recipe,
    texts: Any,
    candidates: Sequence[float],
    risk: str = "next-token",
    *,
    prompt: int,
    tokenizer: Any = None,
    batch: int = 8,
    ended: Callable[[Array], bool] = lambda losses: False,
    advance: Callable[[int], None] = lambda texts: None,
) -> Live:
    """Loss of every text under every candidate threshold, by running it.

    Parameters
    ----------
    model : transformers model for causal language modelling
        Without exits.
    recipe : Recipe
        With a `Threshold` policy, whose value the candidates replace.
    texts : array
        [n, S] token ids.
    candidates : sequence of float
        [K] thresholds, from safe to loose.
    risk : str, default "next-token"
        One of `RISKS`. ``next-token`` is teacher-forced: the text is fed as it is, token by token, and what would be
        said after each token behind the prompt is compared with the model alone, which is fed in the same way. The
        others generate greedily. Penalties and the like of the model's generation_config apply to both sides.
    prompt : int
        Tokens of a text that are the prompt; the rest is decoded, or as much generated.
    tokenizer : transformers tokenizer, optional
        For ``rouge-l`` and ``bleu``.
    batch : int, default 8
        Texts decoded together.
    ended : callable, optional
        Told the losses [k, n] of the candidates so far: whether looser ones need not be run any more, because a test in
        fixed sequence has ended.
    advance : callable, optional
        Told the number of texts after each batch: n for the model alone and n for each candidate.

    Returns
    -------
    Live
        Of the candidates that were run.

    Raises
    ------
    ValueError
        At an unknown risk, texts without anything behind the prompt, or a policy without a threshold.

    Examples
    --------
    >>> import math, torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.calibration.live import live_losses
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> live = live_losses(model, exeunt.recipes.calm([1]), torch.randint(64, (3, 9)), [math.inf, 0.0], prompt=4)
    >>> live.losses[0].tolist(), live.layers
    ([0.0, 0.0, 0.0], [4.0, 2.0])
    """
    x = torch.as_tensor(np.asarray(texts), dtype=torch.int64)
    if x.dim() != 2 or not 0 < prompt < x.shape[1] - 1:
        raise ValueError(f"texts must have at least 2 tokens behind a prompt of {prompt}, got shape {list(x.shape)}")
    if risk not in RISKS:
        raise ValueError(f"risk must be one of {', '.join(RISKS)}, got {risk!r}")
    if not isinstance(recipe.policy, Threshold):
        raise ValueError(f"expected a recipe with a Threshold policy, got {recipe.policy}")
    if risk in ("rouge-l", "bleu") and tokenizer is None:
        raise ValueError(f"risk {risk!r} compares words: expected a tokenizer, got none")
    device = next(model.parameters()).device
    parts = x.to(device).split(batch)
    say = _would_say if risk == "next-token" else _says

    full: list[list[int]] = []
    for part in parts:
        full += say(model, part, prompt)
        advance(len(part))
    losses: list[Array] = []
    layers: list[float] = []
    for candidate in candidates:
        policy = dataclasses.replace(recipe.policy, value=candidate)
        early: list[list[int]] = []
        with attach(model, dataclasses.replace(recipe, policy=policy)) as on:
            for part in parts:
                early += say(model, part, prompt)
                advance(len(part))
            layers.append(on.report().layers_per_token)
        losses.append(compared(risk, early, full, tokenizer))
        if ended(np.stack(losses)):
            break
    return Live(np.stack(losses), layers)


def compared(risk: str, early: list[list[int]], full: list[list[int]], tokenizer: Any) -> Array:
    """[n] losses of what was said early against what was said at full depth, rows of ids.

    Examples
    --------
    >>> from exeunt.calibration.live import compared
    >>> compared("token", [[3, 5, 7, 9]], [[3, 5, 7, 8]], tokenizer=None)
    array([0.25])
    """
    if risk in ("next-token", "token"):
        return risks.token_disagreement(early, full)
    words = [[tokenizer.decode(row, skip_special_tokens=True) for row in rows] for rows in (early, full)]
    return risks.rouge_l(*words) if risk == "rouge-l" else risks.bleu(*words)


class Forced:
    """The last logits processor of a generation that has to say these texts: notes what it would have said instead.

    Parameters
    ----------
    texts : Tensor
        [B, S] token ids, prompts and what follows.

    Attributes
    ----------
    words : list of Tensor
        [B] int64, step by step: what greedy search would have taken from the scores that came.

    Examples
    --------
    >>> import torch
    >>> force = Forced(torch.tensor([[3, 5, 1]]))
    >>> force(torch.tensor([[3, 5]]), torch.tensor([[0.0, 0.5, 2.0]])).argmax(-1), force.words
    (tensor([1]), [tensor([2])])
    """

    def __init__(self, texts: Tensor) -> None:
        self.texts = texts
        self.words: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with which nothing but the text's own next token can be said."""
        self.words.append(scores.argmax(-1))
        forced = torch.full_like(scores, -float("inf"))
        return forced.scatter_(1, self.texts[:, ids.shape[1], None], 0.0)


def _would_say(model: Any, texts: Tensor, prompt: int) -> list[list[int]]:
    """What would be said after each token behind the prompt but the last, with whatever is attached.

    The model alone is asked in the same way, since one forward over the text rounds differently and knows nothing of
    the processors of a generation.
    """
    force = Forced(texts)
    with _without_end(model):
        _generate(model, texts, prompt, logits_processor=[force])
    return torch.stack(force.words[1:], 1).tolist()  # the first comes from the prompt's own forward


def _says(model: Any, texts: Tensor, prompt: int) -> list[list[int]]:
    """What is generated greedily."""
    return until_end(_generate(model, texts, prompt)[:, prompt:], model.generation_config.eos_token_id)


def until_end(ids: Tensor, ends: int | list[int] | None) -> list[list[int]]:
    """Rows of [B, S] up to and with the token that ends them.

    Examples
    --------
    >>> until_end(torch.tensor([[5, 0, 7], [5, 6, 7]]), 0)
    [[5, 0], [5, 6, 7]]
    """
    stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    rows = []
    for row in ids.tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append(row[:stop])
    return rows


def _generate(model: Any, texts: Tensor, prompt: int, **options: Any) -> Tensor:
    start = texts[:, :prompt]
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        num_beams=1,
        max_new_tokens=texts.shape[1] - prompt,
        pad_token_id=0,
        **options,
    )


@contextmanager
def _without_end(model: Any) -> Iterator[None]:
    """Generations that go on after a token that ends a text."""
    config = model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends
