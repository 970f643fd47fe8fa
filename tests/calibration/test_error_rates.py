"""Thresholds from error rates of the exits, and BEEM with one for each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import exeunt
from exeunt.calibration import error_rates
from exeunt.policies import Accumulate, At
from exeunt.replay import Recording, replay


def brute(scores, wrong, level, at_least):
    """Every score as a threshold, the lowest that is good; exits in order."""
    stays, found = np.ones(len(scores), bool), []
    for s, w in zip(scores.T, wrong.T, strict=True):
        good = [t for t in s[stays] if (g := stays & (s >= t)).sum() >= at_least and w[g].mean() <= level]
        found.append(min(good, default=math.inf))
        stays &= s < found[-1]
    return tuple(found)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_by_trying_every_score(level, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (80, 4)) / 12  # with ties
    wrong = rng.random((80, 4)) > 0.4 + 0.6 * scores
    assert error_rates(scores, wrong, level, at_least=3) == brute(scores, wrong, level, 3)


def test_what_leaves_errs_no_more_than_full_depth():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=g)
    z = 0.6 * torch.randn(600, 6, 3, generator=g).cumsum(1)
    z += torch.linspace(0.4, 2.5, 6)[:, None] * torch.nn.functional.one_hot(labels, 3)[:, None]
    recording = Recording.of_logits(z, labels=labels)
    policy = Accumulate(1.0, weights=[0.5, 0.75, 1, 1, 1])
    scores = recording.scores(exeunt.confidence.measure("max_prob"), tuple(range(6))).T[:, :5]
    sums = policy.sums(scores, recording.predicted[:, :5])
    wrong = recording.predicted != labels[:, None]
    level = float(wrong[:, -1].double().mean())
    thresholds = error_rates(sums, wrong[:, :5], level)
    told = replay(recording, exeunt.recipes.beem(thresholds, weights=policy.weights))
    for k in range(5):
        left = told.exit == k
        assert int(left.sum()) in (0, *range(10, 601))
        assert not left.any() or float(wrong[left, k].double().mean()) <= level
    assert (told.exit < 5).any()  # rows that stay are the hard ones: of all together nothing is promised


def test_thresholds_for_each_exit():
    policy = Accumulate((0.9, math.inf, 1.5))
    state = policy.start(1)
    said = [policy.step(state, exeunt.policies.Evidence(torch.tensor([0.8]), torch.tensor([1])), At(k, k, 3)).item()
            for k in range(3)]  # fmt: skip
    assert said == [False, False, True]
    with pytest.raises(ValueError, match="threshold must be one number, or one for each of 5 exits, got 2"):
        exeunt.recipes.beem([1.0, 2.0], exits=range(5))
    with pytest.raises(ValueError, match="threshold must be larger than 0, got 0"):
        Accumulate((1.0, 0.0))


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match=r"wrong must have the shape \[2, 1\] of scores, got \[1, 1\]"):
        error_rates([[0.1], [0.2]], [[True]], 0.1)
    with pytest.raises(ValueError, match=r"level must lie in 0\.\.1, got 2"):
        error_rates([[0.1]], [[True]], 2)
    with pytest.raises(ValueError, match="at_least must be 1 or more, got 0"):
        error_rates([[0.1]], [[True]], 0.1, at_least=0)
