"""What goes wrong in published exit rules: each a test that the repaired rule passes, and what `as_code` reproduces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exeunt import ExitStats, calibration, recipes
from exeunt.confidence import ExitPoint, measure
from exeunt.heads import ExitHead
from exeunt.policies import At, Evidence, Patience, Position, Threshold, Vote

FIRST = At(0, 0, 3)


def look(recipe, logits, at=FIRST, state=None):
    """Which rows leave at an exit with these logits."""
    stats, nothing = ExitStats.from_logits(logits.float()), torch.zeros(len(logits), 1)
    point = ExitPoint(nothing, nothing, ExitHead(), stats, logits.shape[1], logits.float())
    state = recipe.start(len(logits), classes=logits.shape[1]) if state is None else state
    return recipe.look(state, point, at)[0].tolist()


SURE = torch.tensor([[100.0, 0.0], [300.0, -300.0], [4.0, 0.0], [0.1, 0.0]])


@pytest.mark.parametrize("name", ["deebert", "gpf", "fastbert", "elbert"])
def test_1_entropy_of_the_most_confident_rows_is_a_number_and_lets_them_leave(name):
    recipe = getattr(recipes, name)(0.2)
    assert look(recipe, SURE) == [True, True, True, False]


def test_1_as_code_the_most_confident_rows_of_deebert_never_leave():
    published = recipes.deebert(0.2, as_code=True)
    assert look(published, SURE) == [False, False, True, False]
    moderate = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3
    assert look(published, moderate) == look(recipes.deebert(0.2), moderate)  # the same entropy where it has one
    x = SURE.double()
    formula = x.exp().sum(1).log() - (x * x.exp()).sum(1) / x.exp().sum(1)
    stats = ExitStats.from_logits(SURE)
    score = published.confidence.score(ExitPoint(SURE, SURE, ExitHead(), stats))
    assert score[:2].isnan().all() and torch.allclose(-score[2:].double(), formula[2:], atol=1e-5)


def test_1_default_of_the_published_deebert_never_exits_and_a_negative_entropy_is_refused():
    assert look(recipes.deebert(0.0), SURE) == [False] * 4
    with pytest.raises(ValueError, match=r"entropy must not be negative, got -1"):
        recipes.deebert(-1.0)


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.deebert(0.3), recipes.fastbert(0.3), recipes.calm([0], 0.5), recipes.gpf(0.3),
        recipes.shallow_deep(0.7), recipes.right_tool(0.7), recipes.beem(0.7), recipes.ensemble(1.0),
    ],
    ids=lambda r: f"{r.measures} {type(r.policy).__name__}",
)  # fmt: skip
def test_2_no_row_waits_for_another(recipe):
    """t5x waits for the least confident row, PABEE and GPF for all of them, EE-LLM asks the last one only."""
    sure, unsure = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.05]])
    leaves = [look(recipe, z)[0] for z in (sure, unsure)]
    assert look(recipe, torch.cat([sure, unsure, sure])) == [leaves[0], leaves[1], leaves[0]]
    assert leaves[0]


def test_2_patience_counts_for_each_row():
    recipe = recipes.pabee(1)
    state = recipe.start(2)
    assert look(recipe, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), At(0, 0, 3), state) == [False, False]
    assert look(recipe, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), At(1, 1, 3), state) == [True, False]


def test_3_regression_with_patience_works_for_several_rows():
    policy = recipes.pabee(1, tolerance=0.1).policy
    state = policy.start(3)
    policy.step(state, Evidence(logits=torch.tensor([[1.0], [1.0], [2.0]])), At(0, 0, 3))
    leave = policy.step(state, Evidence(logits=torch.tensor([[1.05], [1.5], [2.0]])), At(1, 1, 3))
    assert leave.tolist() == [True, False, True]


def test_4_calms_decay_follows_the_position_and_as_code_it_is_inert():
    at = [At(0, 0, 1, Position(t, 100)) for t in (0, 25, 99)]
    scores = torch.tensor([0.75])
    paper, code = recipes.calm([0], 0.8, decay=4.0), recipes.calm([0], 0.8, decay=4.0, as_code=True)
    assert [paper.policy.step({}, Evidence(scores), a).item() for a in at] == [False, False, True]
    just = Evidence(torch.tensor([0.8]))
    assert all(code.policy.step({}, just, a).item() for a in at)
    assert not any(code.policy.step({}, Evidence(scores), a).item() for a in at)


def test_4_saturation_is_a_cosine_for_each_row():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    score = measure("saturation").score(ExitPoint(a, b, ExitHead(), None))
    assert score.tolist() == [1.0, 0.0]  # flattened, as released, both would be 0.5


def test_5_frees_threshold_is_found_beyond_its_grid_and_as_code_is_stuck():
    rng = np.random.default_rng(0)  # where shallow and deep agree the margin is 0.97 or so, else 0.9: beyond the grid
    agrees = np.arange(4000) % 2 == 0
    margin = np.where(agrees, rng.beta(970, 30, 4000), rng.beta(900, 100, 4000))
    found, published = (calibration.beta_mixture(margin, agrees, as_code=code) for code in (False, True))
    assert published == 0.9 and 0.92 < found < 0.96
    logits = torch.tensor([[3.0, 0.0]])  # margin 0.905: as likely as not a token on which they differ
    assert look(recipes.free(4, published), logits) == [True]
    assert look(recipes.free(4, found), logits) == [False]


def test_5_ties_with_frees_threshold_go_on():
    assert recipes.free(4, 0.5).policy.step({}, Evidence(torch.tensor([0.5, 0.50001])), At(0, 4, 1)).tolist() == [
        False, True]  # fmt: skip


def test_8_right_tools_temperatures_apply_at_their_own_exit():
    recipe = recipes.right_tool(0.9, temperatures=[1.0, 4.0], exits=[0, 1])
    state, z = recipe.start(1), torch.tensor([[3.0, 0.0]])  # 0.953, at temperature 4 0.679
    assert look(recipe, z, At(0, 0, 2), state) == [True] and look(recipe, z, At(1, 1, 2), state) == [False]


def test_defaults_let_something_leave():
    """DeeBERT's never did, FREE's stuck at 0.9, FastBERT's at 1.0: a recipe as it comes lets a sure row go."""
    sure = torch.tensor([[12.0, 0.0, 0.0]])
    for name in ("deebert", "fastbert", "gpf", "shallow_deep", "right_tool", "cascadebert", "elbert"):
        assert look(getattr(recipes, name)(), sure) == [True], name
    for name in ("pabee", "leebert", "ensemble", "beem"):
        recipe = getattr(recipes, name)()
        state, left = recipe.start(1, classes=3), []
        for k in range(11):
            left += look(recipe, sure, At(k, k, 11), state)
        assert True in left, name


def test_calibrated_ties_are_reached():
    """Thresholds of the calibrators are for ``score >= threshold``; the recipes that take them have no strict one."""
    for recipe in (recipes.cats(0.5), recipes.calm([0], 0.5), recipes.shallow_deep(0.5)):
        assert isinstance(recipe.policy, Threshold) and not recipe.policy.strict


def test_recipes_are_plain_compositions():
    assert recipes.leebert(3).policy == Patience(3) and recipes.ensemble(2.0, 0.25).policy == Vote(2.0, 0.25)
    assert recipes.leebert(entropy=0.2) == recipes.deebert(0.2)
    assert recipes.berxit([0.25, 0.5]).policy.value == (0.75, 0.5)
    assert recipes.skipdecode(9, 6).exits == (6, 7, 8, 9)
