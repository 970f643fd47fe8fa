"""Replay against each row sent through the exits alone, on every recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exeunt import ExitStats, calibration, recipes
from exeunt.confidence import ExitPoint
from exeunt.heads import CandidateProbe, ExitHead, ExitHeads, Probe
from exeunt.policies import At, Evidence, Falling, FixedDepth, Oracle, Patience, Position, Threshold, Vote, keep
from exeunt.recipes import Recipe
from exeunt.replay import Recording, replay
from exeunt.states import Drop, Propagate

N, DEPTHS, CLASSES = 80, 7, 3


def recording(n=N, seed=0, **more):
    """Rows that grow surer with depth, some with NaN."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, DEPTHS, CLASSES, generator=g).cumsum(1)
    z[torch.rand(n, DEPTHS, generator=g) < 0.03] = math.nan
    measures = {name: torch.rand(n, DEPTHS, generator=g) for name in ("probe", "saturation", "candidate_probe")}
    labels = torch.randint(CLASSES, (n,), generator=g)
    return Recording.of_logits(z, labels=labels, measures=measures, **more)


PROBES = ExitHeads({e: ExitHead(probe=Probe(4), candidates=CandidateProbe()) for e in range(DEPTHS - 1)})

RECIPES = {
    "shallow_deep": recipes.shallow_deep(0.95),
    "act": recipes.act(0.1),
    "act on max_prob": recipes.act(confidence="max_prob"),
    "deebert": recipes.deebert(0.5),
    "deebert as code": recipes.deebert(0.5, as_code=True),
    "right_tool": recipes.right_tool(0.9, temperatures=[1.0, 1.2, 1.4, 1.6, 1.8, 2.0]),
    "fastbert": recipes.fastbert(0.5),
    "cascadebert": recipes.cascadebert(0.9),
    "pabee": recipes.pabee(3),
    "elbert": recipes.elbert(0.2, 3),
    "elbert monotone": recipes.elbert(0.2, 3, kind="monotone"),
    "elbert steady": recipes.elbert(0.2, 2, kind="steady"),
    "ensemble": recipes.ensemble(1.8),
    "leebert": recipes.leebert(2),
    "gpf": recipes.gpf(0.4),
    "berxit": recipes.berxit(0.2),
    "cats": recipes.cats(0.8),
    "beem": recipes.beem(1.8),
    "calm": recipes.calm([0, 2, 4], 0.8),
    "calm, saturation": recipes.calm(range(6), 0.8, confidence="saturation"),
    "free": recipes.free(3, 0.8),
    "specee": recipes.specee(range(6), 0.7, heads=PROBES),
    "agreement": Recipe(None, recipes.calm([0], 1.0, confidence="agreement").confidence, Threshold(1.0), Drop()),
    "thresholds": recipes.shallow_deep([0.99, 0.95, 0.9, 0.8, 0.7, 0.6]),
    "fixed": Recipe(None, None, FixedDepth(3), Drop()),
    "oracle": Recipe(None, None, Oracle(), Drop()),
}


def alone(recipe, rec, i):
    """Exit and answer of row i on its own, by what a host calls."""
    exits = rec.exits if recipe.exits is None else recipe.exits
    state = recipe.start(1, classes=rec.classes)
    for k, layer in enumerate((*exits, rec.layers - 1)):
        at, column = At(k, layer, len(exits)), len(rec.exits) if k == len(exits) else rec.exits.index(layer)
        logits = rec.logits[i : i + 1, column]
        stats = ExitStats.from_logits(logits)
        label = int(stats.argmax)
        if at.last and not recipe.policy.answers:
            return k, label
        if recipe.confidence is None or recipe.confidence.reads_head:
            point = ExitPoint(logits, logits, ExitHead(), stats, rec.classes, logits)
            if isinstance(recipe.policy, Oracle):
                seen = Evidence(label=stats.argmax, truth=rec.predicted[i : i + 1, -1])
                leave = recipe.policy.step(state, seen, at)
            else:
                leave, seen = recipe.look(state, point, at)
        else:
            score = rec.measures[recipe.confidence.name][i : i + 1, column]
            seen = Evidence(score, stats.argmax, None, logits)
            leave = recipe.policy.step(state, seen, at)
        if at.last or bool(leave):
            answer = recipe.policy.answer(keep(state, torch.tensor([0])), seen, at).label
            return k, label if answer is None else int(answer)
    raise AssertionError("full depth lets everything go")


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_as_alone(name):
    rec, recipe = recording(), RECIPES[name]
    got = replay(rec, recipe)
    assert list(zip(got.exit.tolist(), got.label.tolist(), strict=True)) == [alone(recipe, rec, i) for i in range(N)]
    assert len(got.exit.unique()) > 1 or name == "fixed"
    exits = (*(rec.exits if recipe.exits is None else recipe.exits), rec.layers - 1)
    assert got.depth.tolist() == [exits[k] for k in got.exit]
    assert got.mean_layers == pytest.approx(np.mean([d + 1 for d in got.depth]))


def test_thresholds_as_the_calibrators_count_them():
    rec = recording(400)
    got = replay(rec, recipes.shallow_deep(0.9))
    usable = ~(rec.predicted < 0).any(1)
    scores = rec.scores(recipes.shallow_deep(0.9).confidence, tuple(range(DEPTHS)))[:-1].T
    assert got.exit[usable].tolist() == calibration.first_exit(scores[usable], 0.9).tolist()


def test_figures():
    logits = torch.tensor([[[4.0, 0.0], [3.0, 0.0]], [[0.0, 0.1], [3.0, 0.0]], [[0.0, 5.0], [3.0, 0.0]]])
    got = replay(Recording.of_logits(logits, labels=[0, 0, 1]), recipes.deebert(0.5))
    assert got.exit.tolist() == [0, 1, 0] and got.label.tolist() == [0, 0, 1]
    assert got.mean_layers == pytest.approx(4 / 3) and got.speedup == pytest.approx(1.5)
    assert got.consistency == pytest.approx(2 / 3) and got.accuracy == 1.0
    assert str(got) == "1.33 of 2 layers, 66.7% as full depth, 100.0% right (exact: rows don't see each other)"


def test_what_a_cascade_costs_adds_up():
    logits = torch.tensor([[[4.0, 0.0], [3.0, 0.0]], [[0.0, 0.1], [3.0, 0.0]]])
    rec = Recording.of_logits(logits, exits=[1], layers=12, costs=(2, 14))
    got = replay(rec, recipes.cascadebert(0.9))
    assert got.cost.tolist() == [2, 14] and got.speedup == pytest.approx(12 / 8)


def test_positions_are_followed_and_said_to_be_exact_or_an_estimate():
    rec = recording(60, positions=torch.arange(60) % 10, limit=10)
    fixed = replay(rec, recipes.skipdecode(5, 1))
    falls = [Falling(5, 1)(Position(t % 10, 10)) for t in range(60)]
    assert fixed.depth.tolist() == falls and fixed.exact
    decayed = replay(rec, recipes.calm(range(6), 0.8, decay=4.0))
    assert not decayed.exact and "estimate" in str(decayed)
    for p in range(10):  # each position with the threshold that it has
        rows = (rec.positions == p).nonzero()[:, 0]
        value = decayed.recipe.policy.decay(0.8, Position(p, 10))
        one = replay(rec.take(rows), recipes.calm(range(6), value))
        assert torch.equal(one.exit, decayed.exit[rows])
    assert replay(recording(), recipes.calm(range(6), 0.8)).exact  # rows of a classifier


def test_statistics_alone_suffice_where_no_rule_asks_for_logits():
    whole = recording()
    many = Recording(whole.exits, whole.layers, 70000, whole.statistics, whole.predicted, measures=whole.measures)
    for name, recipe in RECIPES.items():
        if name not in ("act", "act on max_prob", "right_tool", "ensemble", "fastbert") and "elbert" not in name:
            assert torch.equal(replay(many, recipe).exit, replay(whole, recipe).exit), name
    with pytest.raises(
        ValueError, match="Halting needs whole logits, which are kept for 64 classes at most, got 70000"
    ):
        replay(many, RECIPES["act"])


def test_scores_are_those_of_the_exits_that_a_recipe_has():
    rec = recording()
    both = [Recipe(e, RECIPES["agreement"].confidence, Threshold(1.0), Drop()) for e in ((0, 3), (2, 3))]
    for recipe in [*both, *both]:
        first, second = (rec.predicted[:, e] for e in recipe.exits)
        assert ((replay(rec, recipe).exit == 1) == ((first == second) & (first >= 0))).all()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: replay(recording(), recipes.calm([0, 9], 0.5)), r"has exits \[0, .*, 5\], .* asks for \[9\] too"),
        (lambda: replay(recording(), recipes.pabee(6)), r"less than the number of exits \(6\)"),
        (lambda: replay(recording(), recipes.shallow_deep([0.5])), "one for each of 6 exits, got 1"),
        (lambda: replay(recording(), recipes.skipdecode(5, 1)), "follows positions: expected recorded tokens"),
        (lambda: replay(Recording.of_logits(torch.randn(3, 4, 2)), recipes.cats()), "recorded scores of it, got none"),
        (
            lambda: replay(Recording.of_logits(torch.randn(3, 4, 2)), Recipe(None, None, Oracle("label"), Drop())),
            "Oracle needs labels: expected a recording that has them, got none",
        ),
        (lambda: replay(Recording.of_logits(torch.randn(3, 4, 2)), RECIPES["fixed"]).accuracy, "accuracy needs labels"),
        (
            lambda: replay(recording(positions=torch.zeros(N)), Recipe(None, None, Vote(1.0), Propagate())),
            "take their exit's own word, got Vote",
        ),
        (lambda: replay(recording(), recipes.right_tool(temperatures=[1.0])), "one for each exit, got 1"),
        (lambda: Recording.of_logits(torch.randn(3, 4)), r"shape \[n, exits \+ 1, classes\], got \[3, 4\]"),
        (lambda: Recording.of_logits(torch.randn(3, 4, 2), labels=[1]), r"labels must have shape \[3\], got \[1\]"),
        (lambda: Recording.of_logits(torch.randn(3, 4, 2), exits=[2, 1, 0]), "ascend without repeats"),
        (lambda: Recording.of_logits(torch.randn(3, 4, 2), layers=3), "before the last of 3 layers"),
        (lambda: Recording.of_logits(torch.randn(3, 4, 2), costs=(1, 2)), r"exit and full depth \(4\), got 2"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_patience_on_regression():
    z = torch.tensor([[[1.0], [1.02], [1.03], [2.0]], [[1.0], [2.0], [3.0], [4.0]]])
    got = replay(Recording.of_logits(z), Recipe(None, None, Patience(2, tolerance=0.1), Drop()))
    assert got.exit.tolist() == [2, 3]
