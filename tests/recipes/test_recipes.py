"""Confidence measures, policies and recipes on hand-computed cases, and what they say to bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from exeunt import ExitStats, confidence, policies, recipes, states
from exeunt.heads import ExitHead, ExitHeads, Probe

HERE = policies.At(0, 3, 1, policies.Position(5, 100))


def point(logits=None, hidden=None, previous=None, head=None):
    stats = None if logits is None else ExitStats.from_logits(torch.tensor(logits))
    return confidence.ExitPoint(hidden, previous, head or ExitHead(), stats)


def leaves(policy, scores):
    return policy.step({}, policies.Evidence(scores), HERE)


def test_measures_on_two_logits_three_to_one():
    p = point([[math.log(3.0), 0.0]])  # probabilities 3/4, 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for name, expected in (("max_prob", 0.75), ("margin", 0.5), ("neg_entropy", -entropy)):
        assert float(confidence.measure(name).score(p)) == pytest.approx(expected, abs=1e-6)


def test_certain_and_uniform_rows():
    p = point([[200.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert confidence.measure("max_prob").score(p).tolist() == pytest.approx([1.0, 1 / 3])
    assert confidence.measure("margin").score(p).tolist() == pytest.approx([1.0, 0.0])
    assert confidence.measure("neg_entropy").score(p).tolist() == pytest.approx([0.0, -math.log(3)])


def test_flagged_rows_never_leave():
    p = point([[float("nan"), 0.0], [float("inf"), 0.0]])
    for name, low in (("max_prob", 0.0), ("margin", 0.0), ("neg_entropy", -math.inf)):
        scores = confidence.measure(name).score(p)
        assert torch.isnan(scores).all()
        assert not leaves(policies.Threshold(low), scores).any()


def test_saturation_is_the_cosine_of_output_and_input():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    got = confidence.measure("saturation").score(point(hidden=a, previous=b))
    assert got.tolist() == pytest.approx([0.0, math.sqrt(0.5), -1.0, 0.0])
    long = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    assert float(confidence.measure("saturation").score(point(hidden=long, previous=long))) <= 1.0


def test_probe_reads_the_exit_state():
    head = ExitHead(probe=Probe(2))
    with torch.no_grad():
        head.probe.weight.copy_(torch.tensor([1.0, 0.0]))
    state = torch.tensor([[3.0, 0.0]])  # rms-normalised to sqrt(2), 0
    got = confidence.measure("probe").score(point(hidden=state, head=head))
    assert float(got.detach()) == pytest.approx(1 / (1 + math.exp(-math.sqrt(2))), abs=1e-5)


def test_probe_with_a_hidden_layer_as_the_module_computes_it():
    torch.manual_seed(0)
    head = ExitHead(probe=Probe(16, width=8))
    torch.nn.init.normal_(head.probe.weight)
    state = torch.randn(5, 16)
    with torch.no_grad():
        got = confidence.measure("probe").score(point(hidden=state, head=head))
        assert torch.allclose(got, head.probe(state), atol=1e-6)


def test_measures_that_read_more_than_one_number():
    p = point([[2.0, 0.5, -1.0], [1.0, 1.0, 1.0], [math.nan, 0.0, 0.0]])
    assert confidence.measure("logit_margin").score(p)[:2].tolist() == [1.5, 0.0]
    p = dataclasses.replace(p, classes=3)
    uniform = confidence.measure("neg_normalized_entropy").score(p)
    assert uniform[1] == pytest.approx(-1.0) and -1 < uniform[0] < 0 and uniform[2].isnan()
    p = dataclasses.replace(p, earlier=torch.tensor([0, 1, -1]))  # NaN agrees with nothing, not even with NaN
    assert confidence.measure("agreement").score(p).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="expected the number of classes, got none"):
        confidence.measure("neg_normalized_entropy").score(dataclasses.replace(p, classes=None))


def test_agreement_is_carried_by_the_recipe_with_its_rows():
    recipe = recipes.Recipe(None, confidence.measure("agreement"), policies.Threshold(1.0), states.Drop())
    state = recipe.start(3)
    logits = torch.eye(3)
    leave, _ = recipe.look(state, point(logits.tolist()), policies.At(0, 0, 3))
    assert not leave.any()  # nothing to agree with yet
    state = policies.keep(state, torch.tensor([2, 0]))
    leave, seen = recipe.look(state, point(logits[[2, 1]].tolist()), policies.At(1, 1, 3))
    assert leave.tolist() == [True, False] and seen.label.tolist() == [2, 1]


def test_threshold_reaches_and_nan_stays():
    scores = torch.tensor([0.5, 0.49999, math.nan, 1.0])
    assert leaves(policies.Threshold(0.5), scores).tolist() == [True, False, False, True]
    assert not leaves(policies.Threshold(math.inf), torch.tensor([1.0])).any()


@pytest.mark.parametrize(
    "t,expected", [(0, 0.9 * 0.8 + 0.1), (25, 0.72 + 0.1 * math.exp(-1)), (100, 0.72 + 0.1 * math.exp(-4))]
)
def test_decay_as_the_paper_writes_it(t, expected):
    decay = policies.Decay(4.0)
    assert decay(0.8, policies.Position(t, 100)) == pytest.approx(expected)
    assert policies.Decay(4.0, length=50)(0.8, policies.Position(t, 100)) == pytest.approx(
        0.72 + 0.1 * math.exp(-4 * t / 50)
    )


def test_decay_is_clipped_and_leaves_never_alone():
    assert policies.Decay(0.0)(1.0, policies.Position(3, 10)) == 1.0
    policy = policies.Threshold(math.inf, policies.Decay(4.0))
    assert not leaves(policy, torch.tensor([1.0])).any()


def test_calm_is_a_composition():
    heads = ExitHeads({7: ExitHead(probe=Probe(4)), 3: ExitHead(probe=Probe(4))})
    recipe = recipes.calm(threshold=0.8, confidence="probe", decay=4.0, length=64, heads=heads)
    assert recipe.exits == (3, 7) and recipe.state == states.Propagate() and recipe.heads is heads
    assert recipe.policy == policies.Threshold(0.8, policies.Decay(4.0, 64))
    assert recipes.calm([5, 1], 0.5).exits == (1, 5)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: recipes.calm([1], 1.5), ValueError, r"threshold must lie in 0\.\.1 for margin .*got 1\.5"),
        (lambda: recipes.calm([1], -0.1, confidence="max_prob"), ValueError, r"must lie in 0\.\.1 for max_prob"),
        (lambda: recipes.calm([1], 0.1, confidence="neg_entropy"), ValueError, r"-inf\.\.0 for neg_entropy .*got 0\.1"),
        (lambda: recipes.calm([1], math.nan), ValueError, "threshold must lie in"),
        (lambda: recipes.calm([1], 0.5, confidence="saturation", decay=4.0), ValueError, "decay needs a measure"),
        (lambda: recipes.calm([1], 0.5, decay=-1.0), ValueError, "tau must be finite and not negative, got -1.0"),
        (lambda: recipes.calm([1], 0.5, decay=1.0, length=0), ValueError, "length must be at least 1, got 0"),
        (lambda: recipes.calm([1], 0.5, confidence="certainty"), ValueError, "must be one of max_prob, .*certainty"),
        (lambda: recipes.calm([1], 0.5, confidence="probe"), ValueError, r"needs exit heads .* at exits \[1\]"),
        (lambda: recipes.calm(), ValueError, "give exits, or heads that have them, got neither"),
        (lambda: recipes.calm([]), ValueError, "exits must name at least one layer, got none"),
        (lambda: recipes.calm([1, 1]), ValueError, r"exits must ascend without repeats, got \[1, 1\]"),
        (lambda: recipes.calm([1.5]), TypeError, r"exits must be layer indices \(int\), got \[1\.5\]"),
        (lambda: policies.Decay()(0.5, policies.Position(1, None)), ValueError, "give it a length"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
