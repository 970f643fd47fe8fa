"""Each method on hand-computed cases, and what it says to bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import exeunt
from exeunt import calibration as cal
from exeunt.calibration import risks
from exeunt.calibration.beta_mixture import _expectation_maximisation

ONE = np.zeros((1, 100))


# ---- conformal


def test_unconditional_leaves_earlier_than_shared():
    rng = np.random.default_rng(0)
    scores = rng.random((500, 3))
    consistent = rng.random((500, 3)) < 0.5 + 0.5 * scores
    shared, free = (cal.conformal(scores, consistent, 0.1, v)[0] for v in ("shared", "unconditional"))
    assert free < shared


def test_a_tie_with_the_quantile_stays_in_the_scores_own_dtype():
    """Thresholds are compared with >= in float32: the smallest float32 above the quantile, not float64."""
    scores = torch.tensor([[0.1], [0.7], [0.7], [0.7]])
    found = cal.conformal(scores, torch.zeros(4, 1, dtype=torch.bool), 0.25)
    assert found.dtype == np.float32
    assert not (torch.tensor([0.7]) >= float(found[0])).any()
    assert (torch.tensor([0.7000001]) >= float(found[0])).all()


def test_where_no_exit_is_ever_wrong():
    scores, right = np.random.default_rng(0).random((100, 2)), np.ones((100, 2), bool)
    assert (cal.first_exit(scores, cal.conformal(scores, right, 0.1, "unconditional")) == 0).all()
    found = cal.conformal(scores, right, 0.1, "unconditional")
    assert (found == scores.min()).all(), "a threshold that the measure can have"
    exeunt.recipes.right_tool(found, exits=[0, 1])
    for variant in ("shared", "independent"):  # nothing is known of inconsistent examples
        assert np.isinf(cal.conformal(scores, right, 0.1, variant)).all()


def test_first_exit_and_nan():
    assert cal.first_exit([[0.5, 0.9]], [0.6, 0.9]).tolist() == [1]
    assert cal.first_exit([[0.5, 0.9]], math.inf).tolist() == [2]
    assert cal.first_exit([[math.inf, 0.9]], 0.5).tolist() == [1]  # as a Threshold policy has it


# ---- grids


def test_the_last_candidate_before_the_first_failure():
    losses = np.zeros((4, 100))
    losses[1] = 1  # fails; what comes after is not looked at
    assert cal.learn_then_test(losses, 0.1, 0.9) == 0
    assert cal.risk_control(losses, 0.1, "wsr", confidence=0.9) == 0
    assert cal.risk_control(losses, 0.1) == 0


def test_full_depth_where_nothing_passes():
    assert cal.learn_then_test(np.ones((3, 100)), 0.1, 0.9) is None
    assert cal.risk_control(np.ones((3, 100)), 0.1) is None


def test_sizes_that_suffice_are_the_smallest():
    """Each message names n: one unit less is refused, n itself is not."""
    for call, n in (
        (lambda n: cal.learn_then_test(np.zeros((1, n)), 0.1, 0.9, "binomial"), 22),  # 0.9^22 < 0.1 < 0.9^21
        (lambda n: cal.learn_then_test(np.zeros((1, n)), 0.1, 0.9), 22),
        (lambda n: cal.learn_then_test(np.zeros((1, n)), 0.1, 0.9, "hoeffding"), 116),  # log(10) / (2 * 0.01) = 115.1
        (lambda n: cal.risk_control(np.zeros((1, n)), 0.05), 19),
        (lambda n: cal.conformal(np.zeros((n, 2)), np.zeros((n, 2), bool), 0.05), 19),
        (lambda n: cal.conformal(np.zeros((n, 2)), np.zeros((n, 2), bool), 0.05, "independent"), 39),
    ):
        call(n)
        for fewer in (n - 1, n // 3):
            with pytest.raises(ValueError, match=f"needs at least {n} examples, got {fewer}"):
                call(fewer)
    with pytest.raises(ValueError, match="needs at least") as caught:
        cal.risk_control(np.zeros((1, 5)), 0.05, "wsr", confidence=0.9)
    n = int(str(caught.value).split("at least ")[1].split()[0])
    assert cal.risk_control(np.zeros((1, n)), 0.05, "wsr", confidence=0.9) == 0
    with pytest.raises(ValueError, match=f"needs at least {n}"):
        cal.risk_control(np.zeros((1, n - 1)), 0.05, "wsr", confidence=0.9)


# ---- temperature


def test_temperature_recovers_the_one_that_made_the_labels():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 6, generator=g)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=g)[:, 0]
    found = cal.temperature(logits, labels)
    assert found == pytest.approx(2.5, rel=0.06)
    likelihood = [torch.nn.functional.cross_entropy(logits / t, labels) for t in (found, found * 1.03, found / 1.03)]
    assert min(likelihood) == likelihood[0]


def test_temperatures_feed_later_heads_scaled_logits():
    g = np.random.default_rng(0)
    first, labels = 3 * g.normal(size=(500, 3)), g.integers(3, size=500)
    own = g.normal(size=(500, 3))
    seen = []

    def second(scaled):
        seen.append(scaled[0])
        return own + scaled[0]

    found = cal.temperatures([first, second], labels)
    assert np.allclose(seen[0], first / cal.temperature(first, labels))
    assert found[1] == cal.temperature(own + seen[0], labels)


def test_temperature_of_logits_that_are_always_right_is_low():
    assert 0.01 <= cal.temperature([[3.0, 0.0], [0.0, 1.0]], [0, 1]) < 0.1


# ---- beta mixture


def test_expectation_maximisation_recovers_the_mixture_from_noisy_agreement():
    rng = np.random.default_rng(0)
    high = rng.random(20000) < 0.7
    x = np.where(high, rng.beta(9, 2, 20000), rng.beta(2, 5, 20000))
    noisy = np.where(rng.random(20000) < 0.15, ~high, high)
    found = _expectation_maximisation(x, np.where(noisy, 0.9995, 0.0005))
    assert found.weight == pytest.approx([0.3, 0.7], abs=0.03)
    assert found.alpha / (found.alpha + found.beta) == pytest.approx([2 / 7, 9 / 11], abs=0.02)
    truth = 0.7 * stats.beta(9, 2).pdf(x) / (0.7 * stats.beta(9, 2).pdf(x) + 0.3 * stats.beta(2, 5).pdf(x))
    assert np.abs(found.posterior(x) - truth).mean() < 0.02


def test_as_code_gets_stuck_where_the_repaired_threshold_does_not():
    rng = np.random.default_rng(0)
    agrees = rng.random(500) < 0.5
    scores = np.where(agrees, rng.beta(60, 2, 500), rng.beta(40, 3, 500))  # both high: the cut lies above 0.9
    assert cal.beta_mixture(scores, agrees, as_code=True) == 0.9
    assert 0.9 < cal.beta_mixture(scores, agrees) < 1
    low = np.where(agrees, rng.beta(8, 40, 500), rng.beta(2, 60, 500))  # below 0.3
    assert cal.beta_mixture(low, agrees, as_code=True) == 0.3 and cal.beta_mixture(low, agrees) < 0.15


def test_beta_mixture_without_variance():
    assert 0.3 < cal.beta_mixture([0.3, 0.3, 0.9, 0.9], [False, False, True, True]) <= 0.9


# ---- budget and utility


@pytest.mark.parametrize("ties", [False, True])
def test_budget_is_the_safest_threshold_that_meets_it(ties):
    rng = np.random.default_rng(0)
    layers = np.array([2, 5, 9, 12])
    for target in (2.0, 3.5, 6.0, 8.0, 11.9, 12.0):
        scores = rng.random((40, 3)).round(1 if ties else 9)

        def depth(t, scores=scores):
            return layers[cal.first_exit(scores, t)].mean()

        found = cal.budget(scores, layers, target)
        safer = np.unique(scores)[np.unique(scores) > found]
        assert depth(found) <= target + 1e-9 and all(depth(t) > target for t in safer)
        assert np.isinf(found) == (target >= 12)


def test_utility_keeps_its_window_and_opens_the_worthwhile_exit():
    rng = np.random.default_rng(0)
    scores = rng.random((2000, 3))
    right = np.array([0.2, 0.9, 0.5]) > 0.5
    consistent = (rng.random((2000, 3)) < 0.3 + 0.7 * scores) | right
    found = cal.utility(scores, consistent, [4, 8, 10, 12], 0.02)
    left = cal.first_exit(scores, found)
    wrong = np.concatenate([~consistent, np.zeros((2000, 1), bool)], axis=1)[np.arange(2000), left]
    assert wrong.mean() <= 0.02
    assert found[1] < 0.1  # always right: wide open
    assert np.isinf(cal.utility(scores, np.zeros((2000, 3), bool), [4, 8, 10, 12], 0.0001)).all()


def test_utility_of_infinite_scores_and_within_the_measure():
    scores = np.random.default_rng(0).random((500, 3))
    scores[:3, 0], scores[:, 2] = math.inf, math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cal.utility(scores, np.ones((500, 3), bool), [4, 8, 10, 12], 0.02)
    assert found[0] == scores[3:, 0].min() and found[2] == math.inf and not np.isnan(found).any()
    exeunt.recipes.right_tool(found, exits=[0, 1, 2])


# ---- risks


def test_risks():
    assert risks.token_disagreement([[], [1, 2]], [[], [1, 2]]).tolist() == [0, 0]
    assert risks.token_disagreement([[1]], [[]]).tolist() == [1]
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    text = "the quick brown fox jumps over the lazy dog"
    for loss in (risks.rouge_l, risks.bleu):
        same, other, between = loss([text, "nothing alike", text[:-4]], [text] * 3)
        assert same == pytest.approx(0) and other == pytest.approx(1, abs=0.02) and 0 < between < 0.4


@pytest.mark.parametrize(
    "early,full,rouge",
    [
        ("", "", 0.0), ("!!!", "!!!", 0.0), ("", "yes", 1.0), ("yes", "", 1.0), ("你好世界", "你好世界", 0.0),
        ("你好世界", "你好地球", 0.5), ("нет 5", "да 5", 0.5), ("Ответ 42", "ответ 42!", 0.0), ("สวัสดี", "ลา", 1.0),
        ("कि", "की", 1.0), ("naïve cats", "naïve cat", 0.0), ("x_1 running", "x 1 run", 0.0),
    ],
)  # fmt: skip
def test_texts_of_any_script_and_of_nothing(early, full, rouge):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    assert risks.rouge_l([early], [full]).tolist() == [pytest.approx(rouge)]
    assert (risks.bleu([early], [full])[0] == 0) == (early == full)


def test_words_of_ascii_text_are_rouge_scores_own():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    texts = ["The cats' 3 running dogs, un-believably.", "the cat ran: 3.5 dogs_running", "Nothing (alike)", "a b\nc"]
    for a in texts:
        for b in texts:
            assert risks.rouge_l([a], [b])[0] == pytest.approx(1 - scorer.score(b, a)["rougeL"].fmeasure)


# ---- bad input

EYE = np.eye(100)[:2]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: cal.learn_then_test(ONE + 1.5, 0.1, 0.9), r"losses must lie in 0\.\.1, got 1\.5"),
        (lambda: cal.risk_control(ONE - 0.5, 0.1), r"losses must lie in 0\.\.1, got -0\.5"),
        (lambda: cal.learn_then_test(ONE * math.nan, 0.1, 0.9), r"losses must be numbers, got NaN at \[0, 0\]"),
        (lambda: cal.learn_then_test(np.zeros((0, 5)), 0.1, 0.9), r"losses must not be empty, got shape \[0, 5\]"),
        (lambda: cal.learn_then_test([0.0, 1.0], 0.1, 0.9), r"losses must have 2 dimensions, got shape \[2\]"),
        (lambda: cal.learn_then_test(ONE, 1.0, 0.9), "level must lie strictly between 0 and 1, got 1.0"),
        (lambda: cal.learn_then_test(ONE, 0.1, 0.0), "confidence must lie strictly between 0 and 1, got 0.0"),
        (lambda: cal.learn_then_test(ONE, math.nan, 0.9), "level must lie strictly between 0 and 1, got nan"),
        (lambda: cal.learn_then_test(ONE, 0.1, 0.9, "t_test"), "p_value must be one of hoeffding_bentkus, .*t_test"),
        (lambda: cal.learn_then_test(ONE + 0.5, 0.1, 0.9, "binomial"), "'binomial' needs losses of 0 and 1, got 0.5"),
        (lambda: cal.learn_then_test(EYE, 0.1, 0.9, candidates=[0.5, 0.7]), r"descend .*got 0\.5 before 0\.7"),
        (lambda: cal.risk_control(EYE, 0.1, candidates=[0.5, 0.5]), r"descend .*got 0\.5 before 0\.5"),
        (lambda: cal.risk_control(EYE, 0.1, candidates=[0.5]), r"one per row of losses \(2\), got 1"),
        (lambda: cal.risk_control(EYE, 0.1, "rcps"), "method must be one of crc, wsr, got 'rcps'"),
        (lambda: cal.risk_control(EYE, 0.1, "wsr"), "'wsr' needs a confidence between 0 and 1, got none"),
        (lambda: cal.risk_control(EYE, 0.1, confidence=0.9), "'crc' holds on average and takes no confidence, got 0.9"),
        (lambda: cal.risk_control(EYE, 0.1, monotonise=False), "never fall .*got 1 before 0 for unit 0: set monoton"),
        (lambda: cal.conformal([[math.nan]], [[True]], 0.1), r"scores must be numbers, got NaN at \[0, 0\]"),
        (lambda: cal.conformal(np.zeros((0, 2)), np.zeros((0, 2)), 0.1), "scores must not be empty"),
        (lambda: cal.conformal(EYE, EYE[:1], 0.1), r"consistent must have the shape \[2, 100\] of scores, got \[1"),
        (lambda: cal.conformal(EYE, EYE, 0.1, "naive"), "variant must be one of shared, independent, uncond.*'naive'"),
        (lambda: cal.conformal(EYE, EYE, 0.1), r"conformal \(shared\) at this level needs at least 9 examples, got 2"),
        (lambda: cal.temperature([[1.0, 0.0]], [2]), r"labels must be integers in 0\.\.1, got int64 in 2\.\.2"),
        (lambda: cal.temperature([[1.0, 0.0]], [0, 1]), r"one per row of logits \(1\), got 2"),
        (lambda: cal.temperature([[math.inf, 0.0]], [0]), "logits must be finite, got inf"),
        (lambda: cal.beta_mixture([0.5, 1.5], [True, False]), r"scores must lie in 0\.\.1, got 1\.5"),
        (lambda: cal.beta_mixture([0.5, 0.6], [True, True]), "needs two scores of either kind, got 2 that agree of 2"),
        (lambda: cal.budget(EYE, [1, 2], 1.0), "layers must be 101 ascending numbers"),
        (lambda: cal.budget([[0.5]], [4, 8], 3.0), "mean_depth must be at least 4, the depth of the first exit, got 3"),
        (lambda: cal.utility([[0.5]], [[True]], [8, 4], 0.1), r"layers must be 2 ascending numbers, got \[8, 4\]"),
        (lambda: cal.utility([[0.5]], [[True]], [4, 8], 0.1, step=0.0), "steps must be positive"),
        (lambda: risks.token_disagreement([], []), "as many outputs as references and at least one, got 0 and 0"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
