"""Calibration on recordings: what replay says is what is certified, and what it cannot say is refused."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import exeunt
from exeunt.calibration import calibrating
from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.evaluation import record, runner


@pytest.fixture(scope="module")
def encoder():
    config = BertConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def recorded(n=400, **more):
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(n, 1))
    shown = np.concatenate([truth + rng.normal(size=(n, 1)) * s for s in (0.8, 0.4, 0.2, 0.0)], 1)
    logits = np.stack([shown, -shown], -1) * np.array([1.5, 2, 3, 4])[:, None]
    return exeunt.replay.Recording.of_logits(logits, labels=(truth[:, 0] < 0).astype(int), **more)


@pytest.mark.parametrize("method", calibrating.METHODS)
def test_recordings_calibrate_as_their_losses_by_hand(encoder, method):
    recording, grid = recorded(), [1.0, 0.95, 0.9, 0.8, 0.7, 0.5]
    found = calibrating.calibrate_recorded(
        encoder, exeunt.recipes.right_tool(), recording, grid, level=0.1, method=method
    )
    scores = recording.logits.softmax(-1).max(-1).values
    losses = np.zeros((len(grid), len(recording)))
    for k, threshold in enumerate(grid):
        for i in range(len(recording)):
            exit = next((e for e in range(3) if scores[i, e] >= threshold), 3)
            losses[k, i] = recording.predicted[i, exit] != recording.predicted[i, 3]
    assert (found.live.losses == losses).all()
    row = calibrating._choose(losses, 0.1, None if method == "crc" else 0.95, method, grid)
    assert row is not None and found.threshold == grid[row] < 0.95
    assert found.calibration.contract.unit == "example" and found.calibration.contract.n == 400


def test_recordings_against_the_truth_and_what_is_refused(encoder):
    recipe, grid = exeunt.recipes.right_tool(), [0.95, 0.8]
    options = {"level": 0.3, "risk": "error"}
    found = calibrating.calibrate_recorded(encoder, recipe, recorded(), grid, **options)
    assert found.calibration.contract.risk == "1 - accuracy"
    calls = [
        (recorded(about={"model": {"weights": "x"}}), {}, "the recording belongs to another model"),
        (recorded(), {"method": "crc"}, "needs losses that full depth does not have"),
        (recorded(), {"risk": "taste"}, "risk must be disagreement or error, got 'taste'"),
        (recorded(3), {}, r"at this level needs at least \d+ examples, got 3"),
        (recorded(), {"level": 1.5}, "must lie strictly between 0 and 1"),
    ]
    for recording, change, sentence in calls:
        with pytest.raises(ValueError, match=sentence):
            calibrating.calibrate_recorded(encoder, recipe, recording, grid, **options | change)
    bare = dataclasses.replace(recorded(), labels=None)
    with pytest.raises(ValueError, match="risk 'error' needs labels"):
        calibrating.calibrate_recorded(encoder, recipe, bare, grid, **options)


def test_tokens_are_no_units(encoder):
    """Those of one text depend on each other: as examples they would promise what does not hold."""
    tokens = recorded(positions=np.arange(400))
    for some in (exeunt.recipes.calm([0, 1]), exeunt.recipes.right_tool()):
        with pytest.raises(ValueError, match="expected a recording of examples, got one of tokens"):
            calibrating.calibrate_recorded(encoder, some, tokens, [0.9], level=0.3)


def test_full_depth_is_a_fallback_only_where_it_keeps_the_level_itself(encoder):
    recording = recorded()
    flipped = torch.arange(400) % 10 < 2
    recording.labels = torch.where(flipped, 1 - recording.labels, recording.labels)  # full depth errs in a fifth

    def found(recipe, level, risk, grid=(0.5,), **more):
        return calibrating.calibrate_recorded(encoder, recipe, recording, grid, level=level, risk=risk, **more)

    recipe = exeunt.recipes.right_tool()
    with pytest.raises(
        ValueError, match="not even without any exit is 1 - accuracy shown to be at most 0.1: it is 0.2"
    ):
        found(recipe, 0.1, "error")
    assert found(recipe, 0.25, "error").threshold == math.inf
    assert found(recipe, 0.05, "disagreement").threshold == math.inf
    confident = exeunt.recipes.shallow_deep()  # without any exit it answers with the most confident
    recording.statistics, recording.logits, recording.predicted = (
        x[:, [0, 1, 3, 2]] for x in (recording.statistics, recording.logits, recording.predicted)
    )
    with pytest.raises(ValueError, match="not even without any exit is label disagreement shown to be at most 0.02"):
        found(confident, 0.02, "disagreement")
    with pytest.raises(ValueError, match=r"expected a policy with fallback 'last', got 'most_confident'"):
        found(confident, 0.1, "disagreement", method="crc")


def test_falling_back_is_a_part_of_the_test():
    """Two thresholds just above the level: one is let through as seldom as promised, though each has its own chance."""
    rng, level, runs = np.random.default_rng(0), 0.1, 1000
    passed = 0
    for _ in range(runs):
        losses = (rng.random((2, 200)) < level + 0.001).astype(float)
        try:
            calibrating._settle(losses, (math.inf, 0.5), level, 0.9, "wsr", "x", "example")
            passed += 1
        except ValueError:
            pass
    assert passed / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)


def test_a_recording_is_held_to_the_exit_heads_that_it_shows(encoder, tmp_path):
    torch.manual_seed(1)
    heads, others = (ClassifierHeads({e: LinearHead(32, 2) for e in range(3)}) for _ in range(2))
    units = [[5, 6, 7 + i % 40] for i in range(60)]
    recording = record(
        runner(encoder, heads), units, tmp_path, exits=[0, 1, 2], layers=4, model=encoder, progress=False
    )
    calibrate = functools.partial(calibrating.calibrate_recorded, encoder, candidates=[0.9], level=0.5)
    recipe = exeunt.recipes.right_tool(heads=heads)
    made = calibrate(recipe, recording=recording).calibration
    with exeunt.attach(encoder, recipe, calibration=made) as early:
        assert early.recipe.policy.value == made.thresholds[0]
    for wrong in (others, None):
        with pytest.raises(ValueError, match="the recording belongs to other exit heads"):
            calibrate(exeunt.recipes.right_tool(heads=wrong), recording=recording)
