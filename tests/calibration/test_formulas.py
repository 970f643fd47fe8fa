"""Small-sample formulas against enumeration of everything that can happen, for up to 8 units."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from exeunt.calibration import conformal, first_exit, learn_then_test, risk_control
from exeunt.calibration.learn_then_test import p_values
from exeunt.calibration.risk_control import capital

SIZES = range(1, 9)
LEVELS = (0.125, 0.29, 0.5, 0.75)


def sequences(n, values=(0.0, 1.0)):
    return np.array(list(itertools.product(values, repeat=n)))


def likelihood(x, mean):
    """Probability of each sequence of 0/1 losses with that mean."""
    return (mean**x * (1 - mean) ** (1 - x)).prod(1)


# ---- p-values


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", SIZES)
def test_binomial_p_value_is_the_enumerated_tail(n, level):
    x = sequences(n)
    chance = likelihood(x, level)
    for total in range(n + 1):
        tail = chance[x.sum(1) <= total].sum()
        assert p_values(np.array([float(total)]), n, level, "binomial")[0] == pytest.approx(tail, rel=1e-12)


@pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "hoeffding", "binomial"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", SIZES)
def test_p_values_are_super_uniform(n, level, p_value):
    """P(p <= u) <= u at every u, for risks at and above the level."""
    x = sequences(n)
    p = p_values(x.sum(1), n, level, p_value)
    for mean in np.linspace(level, 1, 7):
        chance = likelihood(x, mean)
        for u in np.unique(p):
            assert chance[p <= u].sum() <= u * (1 + 1e-9)


@pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "hoeffding"])
@pytest.mark.parametrize("n", range(1, 7))
def test_p_values_are_super_uniform_for_fractional_losses(n, p_value):
    x = sequences(n, (0.0, 0.5, 1.0))
    p = p_values(x.sum(1), n, 0.4, p_value)
    for half, one in ((0.8, 0.0), (0.4, 0.2), (0.0, 0.4), (0.5, 0.3)):  # chances of losses 1/2 and 1: mean >= 0.4
        chance = np.select([x == 0.5, x == 1], [half, one], 1 - half - one).prod(1)
        for u in np.unique(p):
            assert chance[p <= u].sum() <= u * (1 + 1e-9)


def test_hoeffding_bentkus_by_hand():
    n, level, total = 8, 0.5, 2.5
    mean = total / n
    kl = mean * math.log(mean / level) + (1 - mean) * math.log((1 - mean) / (1 - level))
    bentkus = math.e * sum(math.comb(n, k) for k in range(4)) / 2**n  # ceil(2.5) = 3
    assert p_values(np.array([total]), n, level, "hoeffding_bentkus")[0] == pytest.approx(
        min(math.exp(-n * kl), bentkus)
    )


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("n", range(1, 6))
def test_fixed_sequence_violates_with_the_promised_probability_at_most(n, confidence):
    """Three nested candidates, every joint outcome: each unit fails from some candidate on, or never."""
    level, onsets = 0.3, sequences(n, (0, 1, 2, 3)).astype(int)
    x = (onsets[:, None, :] <= np.arange(3)[:, None]).astype(float)  # [outcomes, K, n]
    for risks in ((0.1, 0.3, 0.31), (0.31, 0.5, 0.6), (0.0, 0.31, 0.9)):
        cells = np.diff([0, *risks, 1])
        chance = cells[onsets].prod(1)
        violated = 0.0
        for losses, weight in zip(x, chance, strict=True):
            try:
                pick = learn_then_test(losses, level, confidence, "binomial")
            except ValueError:  # n too small at this level
                pick = None
            violated += weight * (pick is not None and risks[pick] > level)
        assert violated <= 1 - confidence + 1e-12


# ---- betting


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", SIZES)
def test_capital_is_a_martingale_at_the_level(n, level):
    x = sequences(n)
    for confidence in (0.9, 0.2):  # few units: the first bets all it may, the second less
        fortune = np.exp(capital(x, level, confidence))
        assert likelihood(x, level) @ fortune == pytest.approx(np.ones(n), rel=1e-12)
        for mean in (level, (1 + level) / 2):
            for u in (0.5, 0.2, 0.1):
                assert likelihood(x, mean)[fortune.max(1) >= 1 / u].sum() <= u


def test_capital_bets_on_the_past_only():
    x = np.random.default_rng(0).random((1, 8))
    changed = x.copy()
    changed[0, 5] = 1 - changed[0, 5]
    steps = np.diff(capital(np.concatenate([x, changed]), 0.3, 0.2), prepend=0.0, axis=1)
    bets = np.expm1(steps) / (0.3 - np.concatenate([x, changed]))
    assert bets.max() < 1 and bets[0, :6] == pytest.approx(bets[1, :6]) and abs(bets[0, 6] - bets[1, 6]) > 1e-3


# ---- conformal: every unit of n + 1 is the one that follows, in turn


def thresholds(scores, consistent, level, variant):
    try:
        return conformal(scores, consistent, level, variant)
    except ValueError:  # too few units: never exit
        return np.full(scores.shape[1], np.inf)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", SIZES)
def test_unconditional_coverage_is_exact_without_ties(n, level):
    """One exit, always wrong, n + 1 distinct scores: floor(level (n + 1)) of the n + 1 leave."""
    scores = np.random.default_rng(n).permutation(n + 1)[:, None] / (n + 1)
    wrong = np.zeros((n + 1, 1), bool)
    left = 0
    for i in range(n + 1):
        rest = np.delete(np.arange(n + 1), i)
        left += int(scores[i, 0] >= thresholds(scores[rest], wrong[rest], level, "unconditional")[0])
    assert left == math.floor(round(level * (n + 1), 9))


@pytest.mark.parametrize("variant", ["shared", "independent", "unconditional"])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_marginal_promise_over_every_choice_of_the_next_unit(n, variant):
    """For any n + 1 units, ties included, the share that leaves wrongly is at most the level."""
    rng = np.random.default_rng(n)
    for _ in range(60):
        scores = rng.integers(0, 4, size=(n + 1, 2)) / 4
        consistent = rng.random((n + 1, 2)) < 0.5
        for level in LEVELS:
            wrong = 0
            for i in range(n + 1):
                rest = np.delete(np.arange(n + 1), i)
                found = thresholds(scores[rest], consistent[rest], level, variant)
                left = int(first_exit(scores[i : i + 1], found)[0])
                wrong += left < 2 and not consistent[i, left]
            assert wrong <= level * (n + 1) + 1e-9


def test_quantile_equals_a_scan_over_all_thresholds():
    rng = np.random.default_rng(1)
    for n in SIZES:
        scores, level = rng.random((n, 1)), 0.5
        wrong = rng.random((n, 1)) < 0.7
        worst = np.where(wrong, scores, -np.inf)[:, 0]
        allowed = math.floor(level * (n + 1))  # of n + 1, the next one being among the worst
        safe = [t for t in [-np.inf, *worst] if (worst > t).sum() <= allowed - 1]
        expected = max(np.nextafter(min(safe), np.inf), scores.min()) if allowed else np.inf
        assert thresholds(scores, ~wrong, level, "unconditional")[0] == expected


# ---- conformal risk control


@pytest.mark.parametrize("n", SIZES)
def test_crc_equals_its_definition(n):
    rng = np.random.default_rng(n)
    for _ in range(200):
        losses = np.sort(rng.choice([0, 0.25, 0.5, 1], size=(4, n)), axis=0)
        level = float(rng.choice(LEVELS))
        if level * (n + 1) < 1:
            continue
        met = [k for k in range(4) if n / (n + 1) * losses[k].mean() + 1 / (n + 1) <= level + 1e-12]
        assert risk_control(losses, level) == (max(met) if met else None)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_crc_promise_over_every_choice_of_the_next_unit(n):
    """For any n + 1 units the mean loss is at most the level, also where losses fall again."""
    rng = np.random.default_rng(n)
    for _ in range(200):
        losses = rng.choice([0, 0.25, 0.5, 1], size=(4, n + 1))
        level = float(rng.choice([level for level in LEVELS if level * (n + 1) >= 1]))
        total = 0.0
        for i in range(n + 1):
            pick = risk_control(np.delete(losses, i, axis=1), level)
            total += 0.0 if pick is None else losses[pick, i]
        assert total <= level * (n + 1) + 1e-9


def test_levels_are_the_decimals_that_were_written():
    """0.29 * 100 is a little less than 29 in binary: 28 losses of 99 are allowed all the same."""
    losses = np.zeros((1, 99))
    losses[0, :28] = 1
    assert 0.29 * 100 < 29 and risk_control(losses, 0.29) == 0
    scores = np.arange(99.0)[:, None]
    never_right = np.zeros((99, 1), bool)
    assert conformal(scores, never_right, 0.29)[0] == np.nextafter(70.0, np.inf)  # 71st of 99


def test_conditional_risk_of_an_order_statistic_is_beta():
    """P(risk > r) beyond the k-th of n uniform scores, by enumeration of who lies above 1 - r."""
    for n in SIZES:
        above = sequences(n)
        for k in range(1, n + 1):
            for r in (0.1, 0.35, 0.8):
                exceeds = likelihood(above, r)[above.sum(1) <= n - k].sum()  # the k-th smallest is below 1 - r
                assert stats.beta(n + 1 - k, k).sf(r) == pytest.approx(exceeds, rel=1e-10)
