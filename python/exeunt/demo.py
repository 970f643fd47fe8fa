"""The demo run: the same prompts at full depth and with exits, side by side, and what their parts cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exeunt.attach import attach
from exeunt.costs import Clock, Costs
from exeunt.models import Structure, discover
from exeunt.recipes import Recipe

__all__ = ["Answer", "Outcome", "Side", "measure"]

WARM_UP = 4  # tokens of each kind before the clock starts


class Answer(NamedTuple):
    """What the model with exits said to one prompt, token by token, the one that ends it included.

    Attributes
    ----------
    prompt : str
        The user's message.
    pieces : list of str
        The text of each token; joined they are the answer.
    depths : list of int
        How many layers ran for each.
    agrees : list of bool
        Whether the full-depth model would have chosen it after the same prefix.
    same_start : int
        How many of the first tokens equal those of the text generated at full depth.

    Examples
    --------
    >>> from exeunt.demo import Answer
    >>> answer = Answer("Hi", ["Good", " day", "!"], depths=[30, 25, 30], agrees=[True] * 3, same_start=3)
    >>> "".join(answer.pieces), min(answer.depths)
    ('Good day!', 25)
    """

    prompt: str
    pieces: list[str]
    depths: list[int]
    agrees: list[bool]
    same_start: int


class Side(NamedTuple):
    """One way to generate: new tokens, seconds in ``generate`` and reads of the head; tokens/s of each batch.

    Examples
    --------
    >>> from exeunt.demo import Side
    >>> Side(tokens=8, seconds=2.0, head_reads=8, speeds=[3.0, 5.0]).speed
    4.0
    """

    tokens: int
    seconds: float
    head_reads: int
    speeds: list[float]

    @property
    def speed(self) -> float:
        """Tokens per second, mean over the batches: a long answer on one side alone weighs no more there."""
        return statistics.mean(self.speeds)


@dataclass(frozen=True)
class Outcome:
    """All that a demo run found.

    Examples
    --------
    >>> from exeunt import demo, recipes, small_lm
    >>> model, tokenizer = small_lm.load()
    >>> recipe = recipes.calm(small_lm.EXITS, small_lm.THRESHOLD)
    >>> outcome = demo.measure(model, tokenizer, recipe, ["Return the number of"], tokens=2)
    >>> outcome.layers, len(outcome.depths), set(outcome.depths) <= {4, 12}
    (12, 2, True)
    >>> outcome.left == outcome.depths.count(4) / 2
    True
    """

    recipe: Recipe
    structure: Structure  # the model's parts
    batch: int  # rows generated together
    full: Side
    early: Side
    costs: Costs
    answers: list[Answer]  # with exits, one for each prompt

    @property
    def layers(self) -> int:
        """Depth L of the model."""
        return len(self.structure.layers)

    @property
    def depths(self) -> list[int]:
        """Layers run for each token of all answers."""
        return [depth for answer in self.answers for depth in answer.depths]

    @property
    def layers_per_token(self) -> float:
        """Mean number of layers run for a token."""
        return statistics.mean(self.depths)

    @property
    def left(self) -> float:
        """Share of the tokens that left early."""
        return statistics.mean(depth < self.layers for depth in self.depths)

    def agreement(self, among_left: bool = False) -> float:
        """Share of the tokens (or of those that left early) that full depth would have chosen in their place."""
        found = [
            agrees
            for answer in self.answers
            for depth, agrees in zip(answer.depths, answer.agrees, strict=True)
            if depth < self.layers or not among_left
        ]
        return statistics.mean(found) if found else float("nan")


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    tokens: int = 48,
    batch: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> Outcome:
    """Generate from each prompt greedily, at full depth and with exits, and compare.

    Parameters
    ----------
    model, tokenizer : transformers model and tokenizer
        The tokenizer has a chat template and pads on the left.
    recipe : Recipe
        What `exeunt.attach` puts on the model.
    prompts : sequence of str
        One user message each.
    tokens : int, default 48
        New tokens at most.
    batch : int, default 1
        Rows generated together.
    advance : callable
        Told the number of rows after each generation: twice for every prompt in all.

    Returns
    -------
    Outcome

    Examples
    --------
    >>> from exeunt import demo, recipes, small_lm
    >>> model, tokenizer = small_lm.load()
    >>> recipe = recipes.calm(small_lm.EXITS, small_lm.THRESHOLD)
    >>> outcome = demo.measure(model, tokenizer, recipe, ["Return the number of"], tokens=2)
    >>> outcome.full.tokens, outcome.early.tokens, len(outcome.answers)
    (2, 2, 1)
    """
    clock = Clock(discover(model))
    ways = {"full": partial(_at_full_depth, model, clock), "early": partial(_with_exits, model, recipe)}
    runs: dict[str, list[_Run]] = {way: [] for way in ways}
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    encoded = [_encode(tokenizer, group) for group in groups]
    for generate in ways.values():
        generate(encoded[0], min(WARM_UP, tokens))
    clock.clear()
    for turn, inputs in enumerate(encoded):
        for way in ("full", "early") if turn % 2 == 0 else ("early", "full"):
            runs[way].append(ways[way](inputs, tokens))
            advance(len(inputs["input_ids"]))
    answers = [
        _answer(model, tokenizer, prompt, _row(inputs, row), early.said[row], early.depths[row], full.said[row])
        for group, inputs, full, early in zip(groups, encoded, *runs.values(), strict=True)
        for row, prompt in enumerate(group)
    ]
    costs = clock.costs(recipe, rows=len(groups[0]))
    return Outcome(recipe, clock.structure, batch, _side(runs["full"]), _side(runs["early"]), costs, answers)


class _Run(NamedTuple):
    """One ``generate``: rows of new tokens up to their end, layers run for each, reads of the head, seconds."""

    said: list[Tensor]
    depths: list[Tensor]
    head_reads: int
    seconds: float


def _at_full_depth(model: Any, clock: Clock, inputs: Any, limit: int) -> _Run:
    with clock:
        ids, seconds = _generate(model, inputs, limit)
    said = _until_end(model, ids)
    return _Run(said, [torch.full_like(row, len(clock.structure.layers)) for row in said], ids.shape[1], seconds)


def _with_exits(model: Any, recipe: Recipe, inputs: Any, limit: int) -> _Run:
    with attach(model, recipe) as early:
        ids, seconds = _generate(model, inputs, limit)
        report = early.report()
    first = torch.full((len(ids),), report.layers - 1)  # the first token comes from the prompt's own forward
    depths = torch.stack([first, *report.exit_layers], dim=1) + 1  # layers run: one more than the last one's index
    said = _until_end(model, ids)
    kept = [row[: len(own)] for row, own in zip(depths, said, strict=True)]
    return _Run(said, kept, report.head_reads + report.full_forwards, seconds)


def _encode(tokenizer: Any, prompts: Sequence[str]) -> Any:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def _generate(model: Any, inputs: Any, limit: int) -> tuple[Tensor, float]:
    """New tokens [B, n] of a greedy generation, and its seconds."""
    start = time.perf_counter()
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=limit)
    return out[:, inputs["input_ids"].shape[1] :], time.perf_counter() - start


def _until_end(model: Any, ids: Tensor) -> list[Tensor]:
    """Each row up to and with the token that ends it; what follows is padding."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return list(ids)
    stops = torch.isin(ids, torch.tensor(ends, device=ids.device))
    return [row[: int(stop.int().argmax()) + 1] if stop.any() else row for row, stop in zip(ids, stops, strict=True)]


def _side(runs: list[_Run]) -> Side:
    tokens = [sum(map(len, run.said)) for run in runs]
    speeds = [count / run.seconds for count, run in zip(tokens, runs, strict=True)]
    return Side(sum(tokens), sum(run.seconds for run in runs), sum(run.head_reads for run in runs), speeds)


def _answer(
    model: Any, tokenizer: Any, prompt: str, start: Tensor, said: Tensor, depths: Tensor, stock: Tensor
) -> Answer:
    """Compare what was said with what the model chooses at full depth, in one forward over the finished text."""
    logits = model(torch.cat((start, said))[None], use_cache=False).logits[0]
    chosen = logits[len(start) - 1 : -1].argmax(-1)
    shared = min(len(said), len(stock))
    same_start = int((said[:shared] == stock[:shared]).cumprod(0).sum())
    pieces = _pieces(tokenizer, said.tolist())
    return Answer(prompt, pieces, depths.tolist(), (chosen == said).tolist(), same_start)


def _row(inputs: Any, row: int) -> Tensor:
    """The ids of one prompt without padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; a character of several tokens belongs to the last of them."""
    pieces, before = [], ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and n < len(ids):
            text = before
        pieces.append(text[len(before) :])
        before = text
    return pieces
