"""The planner: its arithmetic by hand, what it advises where early exit helps and where it can't, costs of a model."""

from __future__ import annotations

import itertools

import pytest
import torch

import exeunt
from exeunt.evaluation import Costs, baselines, frontier, measure_costs, plan, sweep
from exeunt.policies import FixedDepth
from exeunt.recipes import Recipe
from exeunt.replay import Recording, replay
from exeunt.states import Drop

LAYERS = 6


def recording(n=600, layers=LAYERS, easy=0.7, **more):
    """Rows of which most are clear from the first exit on, the others only at full depth."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=g)
    z = torch.randn(n, layers, 3, generator=g) * 0.3
    hard = torch.rand(n, generator=g) > easy
    z[torch.arange(n), :, labels] += torch.where(hard, 0.0, 5.0)[:, None]
    z[torch.arange(n), -1, labels] += 5.0
    return Recording.of_logits(z, labels=labels, **more)


def costs(**changes):
    settings = {"batch": 1, "layers": LAYERS, "stock": 7.0, "layer": 1.0, "check": 0.1, "leave": 0.0}
    return Costs(**settings | changes)


@pytest.mark.parametrize(
    "changes,depths,exits,seconds",
    [
        ({}, [5, 5], [1], 7.1),  # nobody leaves: the stock step and a check
        ({}, [1, 1], [1], 7 - 4 + 0.1),
        ({}, [1, 5], [1], (3.1 + 7.1) / 2),
        ({}, [3, 3], [1, 3], 7 - 2 + 0.2),
        ({}, [1, 1], [1, 3], 7 - 4 + 0.1),  # who has left is not checked again
        ({"leave": -0.5}, [1, 5], [1], (2.6 + 7.1) / 2),
        ({"batch": 2}, [1, 5], [1], 7.1),  # weights are read for the one that stays
        ({"batch": 2, "fixed": 0.0}, [1, 5], [1], 7 - 2 + 0.1),  # layers cost by the row
        ({"batch": 2, "fixed": 0.5}, [1, 5], [1], 7 - 1 + 0.1),
        ({"batch": 2, "fixed": 0.0}, [1, 5], [1, 3], 7 - 2 + 0.1 + 0.05),
        ({"batch": 2, "fixed": 0.0, "half": 0.25}, [1, 5], [1], 7 - 3 + 0.1),  # who stays is also cut to its length
        ({"batch": 4, "fixed": 0.0, "half": 0.25}, [1, 1, 1, 5], [1], 7 - 3.5 + 0.1),
        ({"batch": 8}, [1, 1], [1], 3.1),  # fewer rows than a batch
    ],
)
def test_seconds_by_hand(changes, depths, exits, seconds):
    assert costs(**changes).seconds(torch.tensor(depths), exits) == pytest.approx(seconds)


def test_ratio_of_a_fixed_depth():
    fixed = replay(recording(), Recipe((2,), None, FixedDepth(2), Drop()))
    assert costs().ratio(fixed) == pytest.approx(7 / (7 - 3 + 0.1))
    assert costs(check=9.0).bound(fixed) == pytest.approx(7 / 4)


def test_helps_where_most_rows_are_clear_early():
    made = plan(recording(), costs(), consistency=0.95, points=10)
    assert made.recipe is not None and made.ratio > 1.5 and made.oracle >= made.ratio
    assert made.replayed.consistency > 0.93 and len(made.replayed.depth) == 300
    assert made.sentences[0].startswith("Leave by ") and f"{made.ratio:.2f}x" in made.sentences[0]
    assert f" at exits {list(made.recipe.exits)}: " in made.sentences[0]  # 0-based, so not "after layers"
    assert replay(recording(), made.recipe).mean_layers < LAYERS  # the recipe is whole: it can be replayed as it is


@pytest.mark.parametrize(
    "changes,easy",
    [({"check": 5.0}, 0.7), ({}, 0.0), ({"layer": 0.05, "check": 0.1}, 0.7), ({"batch": 32}, 0.7)],
    ids=["dear checks", "nobody is clear early", "layers are not what takes the time", "a batch waits for its last"],
)
def test_says_plainly_where_it_does_not_help(changes, easy):
    made = plan(recording(easy=easy), costs(**changes), points=10)
    assert made.recipe is None and made.ratio <= 1.03
    assert made.sentences[0].startswith("Early exit will not help here")
    assert "A check costs" in made.sentences[1]


def test_reasons_name_what_decides():
    dear = str(plan(recording(), costs(check=5.5), points=5))
    assert "A check costs 5.50 layers" in dear and "cannot pay" in dear
    assert "paid for as long as one row runs it" in str(plan(recording(), costs(batch=32), points=5))


def test_probes_are_planned_with_only_where_there_are_heads_for_them():
    probes = exeunt.heads.ExitHeads({e: exeunt.heads.ExitHead(probe=exeunt.heads.Probe(4)) for e in range(5)})
    sure = recording()
    sure.measures["probe"] = (sure.predicted == sure.predicted[:, -1:]).float()
    with_heads = plan(sure, costs(), points=5, heads=probes, only=lambda name: name in ("cats", "deebert"))
    assert with_heads.recipe.measures == "probe" and with_heads.recipe.heads is probes
    assert plan(sure, costs(), points=5, only=lambda name: name == "cats").recipe is None


def test_probes_of_candidates_are_planned_with_only_where_heads_have_them():
    sure = recording(positions=torch.arange(600) % 20, limit=20)
    sure.measures["candidate_probe"] = (sure.predicted == sure.predicted[:, -1:]).float() * 0.8 + 0.1
    specee = {"points": 5, "only": lambda name: name == "specee"}
    assert plan(sure, costs(), **specee).recipe is None
    bare = exeunt.heads.ExitHeads({e: exeunt.heads.ExitHead(probe=exeunt.heads.Probe(4)) for e in range(5)})
    assert plan(sure, costs(), heads=bare, **specee).recipe is None
    three = {e: exeunt.heads.ExitHead(candidates=exeunt.heads.CandidateProbe(3, 8)) for e in range(5)}
    made = plan(sure, costs(), heads=exeunt.heads.ExitHeads(three), **specee)
    assert made.recipe.measures == "candidate_probe" and made.recipe.candidates.count == 3


def test_estimates_are_called_so():
    tokens = recording(positions=torch.arange(600) % 20, limit=20)
    assert "This replay is an estimate" in plan(tokens, costs(), points=5).sentences[-1]


def test_what_cannot_be_met_is_full_depth():
    never = recording(easy=0.0)
    made = plan(never, costs(), consistency=1.0, points=2, only=lambda name: name == "pabee")
    assert made.recipe is None and made.replayed.consistency >= 0.99


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: plan(recording(), costs(), consistency=0.0), r"consistency must lie in 0\.\.1"),
        (lambda: plan(recording(), costs(layers=5)), "costs of a model with 6 layers, got 5"),
        (lambda: plan(recording(1), costs()), "at least two rows"),
        (
            lambda: measure_costs(None, exeunt.recipes.pabee(exits=range(8)), lambda r: 1.0, batch=1, layers=9),
            "a recipe with a confidence measure and exits",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_costs_of_a_model_by_its_own_clock(monkeypatch):
    """A model whose clock is known: every part comes out as it was put in."""
    exits, parts = (1, 3), {"stock": 10.0, "layer": 1.25, "check": 0.5, "leave": 0.25, "row": 0.0625, "half": 0.4}
    attached = []

    class Attach:
        def __init__(self, model, recipe):
            attached.append(recipe)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            attached.pop()

    monkeypatch.setattr("exeunt.evaluation.planner.attach", Attach)
    noise = itertools.cycle([0.0, 1e-9])

    def step(rows):
        stock = parts["stock"] - parts["row"] * (8 - rows)
        if not attached:
            return stock + next(noise)
        recipe = attached[-1]
        if not isinstance(recipe.policy, exeunt.policies.Threshold):  # every second row leaves
            seen = exeunt.policies.Evidence(torch.zeros(8))
            assert recipe.policy.step({}, seen, exeunt.policies.At(0, 1, 1)).sum() == 4 and recipe.exits == (1,)
            saved = (LAYERS - 1 - recipe.exits[0]) * parts["layer"] * (1 - parts["half"])
            return stock - saved + parts["check"] + parts["leave"]
        if recipe.policy.value == float("inf"):
            return stock + len(recipe.exits) * parts["check"]
        return stock - (LAYERS - 1 - recipe.exits[0]) * parts["layer"] + parts["check"] + parts["leave"]

    recipe = Recipe(exits, exeunt.confidence.measure("margin"), exeunt.policies.Threshold(0.5), Drop())
    got = measure_costs(None, recipe, step, batch=8, layers=LAYERS, repeats=3)
    assert got.stock == pytest.approx(10.0) and got.layer == pytest.approx(1.25) and got.check == pytest.approx(0.5)
    assert got.leave == pytest.approx(0.25) and got.fixed == pytest.approx(0.95)  # 9.5 of 10 don't depend on rows
    assert got.half == pytest.approx(0.4)
    one = measure_costs(None, recipe.__class__((1,), *[getattr(recipe, f) for f in ("confidence", "policy", "state")]),
                        step, batch=1, layers=LAYERS, repeats=3)  # fmt: skip
    assert one.fixed == 1.0 and one.layer >= 0


def test_sweeps_and_frontier():
    rec = recording(200)
    curves = sweep(rec, 8)
    assert {"shallow_deep", "deebert", "pabee", "elbert", "ensemble", "beem", "act", "calm", "free"} <= set(curves)
    assert "cats" not in curves and "cascadebert" not in curves  # nothing was recorded for them
    for curve in curves.values():
        layers = [r.mean_layers for r in curve]
        assert layers == sorted(layers) and len(curve) <= 8
    best = frontier([r for curve in curves.values() for r in curve], lambda r: r.accuracy)
    assert [r.accuracy for r in best] == sorted(r.accuracy for r in best)
    known = baselines(rec)
    assert len(known["fixed depth"]) == 5 and known["oracle, as full depth"][0].consistency == 1.0
    assert known["oracle, right"][0].accuracy >= max(r.accuracy for r in best)
