"""Contracts by simulation: 2,000 calibrations a case, on populations whose risk is known exactly."""

from __future__ import annotations

import numpy as np
import pytest

import guarantees
from exeunt.calibration.learn_then_test import p_values

pytestmark = pytest.mark.slow


def name(case):
    return "-".join(str(part) for part in case.args if isinstance(part, str | int)).replace(" ", "")


@pytest.mark.parametrize("case", guarantees.CASES, ids=name)
def test_contract_is_kept_and_not_vacuous(case):
    outcome = case()
    assert len(outcome.risks) >= 2000
    assert outcome.kept, f"{outcome.violated:.3f} above the level, mean risk {outcome.risks.mean():.4f}"
    assert (outcome.risks > 0).any()


@pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "binomial"])
def test_the_first_failing_candidate_breaks_the_contract(p_value):
    """The index that one published calibrator returns; the harness must see it."""

    def first_failing(losses, level):
        failed = p_values(losses.sum(1), losses.shape[1], level, p_value) > 1 - guarantees.CONFIDENCE
        return int(failed.argmax()) if failed.any() else len(losses) - 1

    outcome = guarantees.on_a_grid("wrong", first_failing, 1 - guarantees.CONFIDENCE, "continuous", 200, 9)
    assert not outcome.kept


def test_the_harness_sees_a_marginal_promise_broken():
    def plain_mean(losses, level):  # without the test unit's own possible loss
        return int((losses.mean(1) <= level).sum()) - 1

    assert not guarantees.on_a_grid("wrong", plain_mean, None, "continuous", 20, 101).kept


def test_a_population_is_what_it_says():
    assert len(np.unique(guarantees.population("tied").scores)) <= 41
    assert np.unique(guarantees.population("fractional").losses).tolist() == [0, 0.5, 1]
    people = guarantees.population("continuous")
    for n, level in guarantees.LEVELS.items():
        risks = np.array([people.loss(t).mean() for t in guarantees.grid("continuous", level, 101)])
        assert ((risks > level) & (risks < 1.02 * level)).any(), n
