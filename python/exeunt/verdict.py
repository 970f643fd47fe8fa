"""What a demo run's numbers say: a table, and a few sentences on what early exit gained or lost and why."""

from __future__ import annotations

import math
import statistics

from exeunt.demo import Outcome

__all__ = ["expected_gain", "table", "verdict"]

NOISE = 0.03  # two runs of the same thing differ by this much at least


def table(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Rows of what was measured: its name, at full depth, with exits.

    Examples
    --------
    >>> from exeunt import demo, recipes, small_lm, verdict
    >>> model, tokenizer = small_lm.load()
    >>> outcome = demo.measure(model, tokenizer, recipes.calm(small_lm.EXITS, 0.0), ["Return the number of"], tokens=2)
    >>> verdict.table(outcome)[1:4]  # the first token comes from the prompt's own forward
    [('new tokens', '2', '2'), ('layers run per token', '12.0', '8.0'), ('tokens that left early', '', '50%')]
    """
    full, early = outcome.full, outcome.early
    rows = [
        ("tokens per second, mean of the prompts", f"{full.speed:.1f}", f"{early.speed:.1f}"),
        ("new tokens", f"{full.tokens}", f"{early.tokens}"),
        ("layers run per token", f"{outcome.layers:.1f}", f"{outcome.layers_per_token:.1f}"),
        ("tokens that left early", "", f"{outcome.left:.0%}"),
        ("head reads per token", f"{full.head_reads / full.tokens:.2f}", f"{early.head_reads / early.tokens:.2f}"),
        ("next-token agreement on the early-exit text", "", f"{outcome.agreement():.1%}"),
    ]
    if outcome.left:
        rows.append(("the same for tokens that left early", "", f"{outcome.agreement(among_left=True):.1%}"))
    same = sum(answer.same_start for answer in outcome.answers)
    rows.append(("first tokens equal to the full-depth text", "", f"{same} of {early.tokens}"))
    return rows


def expected_gain(outcome: Outcome) -> float:
    """Gain in speed by arithmetic: what tokens that left saved, minus checks; one row at a time.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from exeunt import costs, demo, recipes, verdict
    >>> answer = demo.Answer("Hi", ["Good", "!"], depths=[4, 2], agrees=[True, True], same_start=2)
    >>> side, model = demo.Side(2, 1.0, 2, [2.0]), SimpleNamespace(layers=[None] * 4)
    >>> parts = costs.Costs(layer=1.0, head=2.0, check=0.5)
    >>> outcome = demo.Outcome(recipes.calm([1]), model, 1, side, side, parts, [answer])
    >>> round(verdict.expected_gain(outcome), 2)  # of 6 seconds a token, 2 are saved and 0.5 go to the check
    0.33
    """
    costs, step = outcome.costs, _step(outcome)
    saved = (outcome.layers - outcome.layers_per_token) * costs.layer
    if outcome.recipe.reads_head:  # a token that leaves takes the check's logits along
        saved += outcome.left * costs.head
    return step / (step - saved + costs.check) - 1


def verdict(outcome: Outcome) -> list[str]:
    """Sentences that follow from the numbers.

    Every token pays the check; one that leaves saves the skipped layers and, if the check has read the head for it,
    the read at the end. So a check pays if the share of tokens that leave exceeds its cost over that saving.

    Examples
    --------
    >>> from exeunt import demo, recipes, small_lm, verdict
    >>> model, tokenizer = small_lm.load()
    >>> outcome = demo.measure(model, tokenizer, recipes.calm(small_lm.EXITS, 0.0), ["Return the number of"], tokens=2)
    >>> print(verdict.verdict(outcome)[1])
    One read of this model's head costs ... and an exit after 4 of 12 layers saves 8.
    """
    if len(outcome.depths) == len(outcome.answers):
        return ["The first token comes from the prompt's own forward and there was no second: no token could leave."]
    layers, costs, recipe = outcome.layers, outcome.costs, outcome.recipe
    reads, first = recipe.reads_head, (recipe.exits or (0,))[0]
    skipped = layers - 1 - first
    head = outcome.structure.weight.numel()
    layer = sum(p.numel() for p in outcome.structure.layers[0].parameters())
    step = _step(outcome)
    saved = skipped * costs.layer + reads * costs.head
    needed = costs.check / saved
    best = step / (step - saved + reads * costs.check) - 1
    sentences = [
        f"{_speed(outcome)}: {outcome.left:.0%} of the tokens left before the last layer, "
        f"and {outcome.agreement():.0%} of all are what full depth would have said there.",
        f"One read of this model's head costs {head / layer:.1f} layers in bytes ({head / 1e6:.1f} million weights "
        f"against {layer / 1e6:.1f}) and {costs.head / costs.layer:.1f} in time, and an exit after {first + 1} of "
        f"{layers} layers saves {skipped}.",
        f"A check by {recipe.measures} reads {'the' if reads else 'no'} head and costs "
        f"{costs.check / costs.layer:.2f} layers: by that alone it pays if more than {needed:.{int(needed < 0.1)}%} of "
        f"the tokens leave{' (they take its logits along)' if reads else ''}.",
        f"Even if every token left there and skipped layers cost nothing more, the gain would be {best:.0%}: a read of "
        f"the head and the first {first + 1} layers remain.",
    ]
    if outcome.batch == 1:
        sentences.insert(
            3,
            f"What leaving saved minus checks is worth {round(expected_gain(outcome), 3) + 0:+.1%}; the rest of what "
            "was measured is keys and values for skipped layers, exeunt's own work in each step, and noise.",
        )
    else:
        sentences.append("In a batch a layer's weights are read as long as one row stays, so that exits save less.")
    return sentences


def _step(outcome: Outcome) -> float:
    """Seconds of a full-depth step by its parts: medians, which a disturbed moment does not move."""
    return outcome.layers * outcome.costs.layer + outcome.costs.head


def _speed(outcome: Outcome) -> str:
    """What can be said about speed: only what exceeds two standard errors of the prompts' mean."""
    change = outcome.early.speed / outcome.full.speed - 1
    changes = [e / f - 1 for e, f in zip(outcome.early.speeds, outcome.full.speeds, strict=True)]
    noise, spread = NOISE, ""
    if len(changes) > 1:
        noise = max(noise, 2 * statistics.stdev(changes) / math.sqrt(len(changes)))
        spread = f"; from prompt to prompt {min(changes):+.0%} to {max(changes):+.0%}"
    if abs(change) < noise:
        return f"This run shows no gain or loss in speed beyond noise ({change:+.1%}{spread})"
    return f"Early exit made this run {'faster' if change > 0 else 'slower'} ({change:+.1%}{spread})"
