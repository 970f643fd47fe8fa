"""The run-time audit: drifted streams are found within its bound, others are left alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import betaln, xlogy

from exeunt.calibration import Audit, Contract, conformal
from exeunt.calibration.audit import evidence

PAC = Contract("label disagreement", 0.1, 0.95, 500, "learn_then_test, binomial")
PAC_TOKENS = Contract("token disagreement", 0.1, 0.95, 500, "risk_control, wsr", "prompt")
RUNS = 400
THREE_ERRORS = 3 * math.sqrt(0.05 * 0.95 / RUNS)


def marginal(n, level, variant="unconditional", parts=1):
    return Contract("label disagreement", level, "marginal", n, f"conformal, {variant}", parts=parts)


def refuted_after(audit, losses):
    """Requests until the audit refutes, None if it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(0, len(losses), 50):
            try:
                audit.observe(losses[i : i + 50])
            except RuntimeWarning as warning:
                return int(str(warning).split("after ")[1].split()[0])
    return None


# ---- the evidence


def test_evidence_is_the_integral_that_it_says():
    prior = stats.beta(0.5, 0.5)
    for total, n, mean in ((3.0, 10, 0.1), (0.0, 4, 0.3), (2.5, 6, 0.2), (9.0, 9, 0.5)):
        above = integrate.quad(lambda q, s=total, n=n: q**s * (1 - q) ** (n - s) * prior.pdf(q), mean, 1)[0]
        expected = above / prior.sf(mean) / (mean**total * (1 - mean) ** (n - total))
        assert evidence(total, n, mean) == pytest.approx(math.log(expected), rel=1e-6)


@pytest.mark.parametrize("n", range(1, 9))
def test_evidence_has_mean_one_at_the_level_by_enumeration(n):
    for mean in (0.05, 0.3, 0.8):
        totals = np.arange(n + 1)
        chance = stats.binom.pmf(totals, n, mean)
        assert chance @ np.exp(evidence(totals, np.full(n + 1, n), mean)) == pytest.approx(1)
        below = stats.binom.pmf(totals, n, 0.6 * mean)
        assert below @ np.exp(evidence(totals, np.full(n + 1, n), mean)) <= 1


def test_the_bound_on_detection_holds_for_every_total():
    """log(n) / 2 + log(2) is what not knowing the risk costs at most, fractional totals included."""
    for n in (1, 2, 3, 17, 300, 10000):
        s = np.linspace(0, n, 999)
        best = xlogy(s, s / n) + xlogy(n - s, 1 - s / n)
        mixture = betaln(s + 0.5, n - s + 0.5) - betaln(0.5, 0.5)
        assert (best - mixture <= math.log(n) / 2 + math.log(2) + 1e-9).all()


# ---- streams


def streams(kind, risk, length, seed):
    """[RUNS, length] losses whose conditional mean is the risk."""
    rng = np.random.default_rng(seed)
    if kind == "labels":
        return (rng.random((RUNS, length)) < risk).astype(float)
    return rng.beta(2 * risk, 2 * (1 - risk), size=(RUNS, length))  # token disagreement of prompts


@pytest.mark.slow
@pytest.mark.parametrize("contract,kind", [(PAC, "labels"), (PAC_TOKENS, "tokens")])
def test_an_undrifted_stream_at_its_very_level_is_not_refuted(contract, kind):
    found = [refuted_after(Audit(contract), x) for x in streams(kind, contract.level, 1000, 1)]
    assert np.mean([f is not None for f in found]) <= 0.05 + THREE_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize("contract,kind", [(PAC, "labels"), (PAC_TOKENS, "tokens")])
@pytest.mark.parametrize("risk", [0.2, 0.4])
def test_a_drifted_stream_is_refuted_within_the_bound(contract, kind, risk):
    """By the request at which even an unlucky stream's mean (lowest 5 %) is refuted."""
    audit = Audit(contract)
    bound = next(
        n for n in range(1, 5000) if (low := _lowest(kind, risk, n)) > 0.1 and audit.requests_to_refute(low) <= n
    )
    found = [refuted_after(Audit(contract), x) for x in streams(kind, risk, bound, 2)]
    assert np.mean([f is not None for f in found]) >= 0.95 - THREE_ERRORS
    assert np.median([f for f in found if f]) < bound


def _lowest(kind, risk, n):
    """5 % quantile of the mean of n losses; Hoeffding's bound where there is no formula."""
    return stats.binom.ppf(0.05, n, risk) / n if kind == "labels" else risk - math.sqrt(math.log(20) / (2 * n))


@pytest.mark.slow
def test_a_drift_after_a_good_past_is_refuted_when_the_whole_stream_says_so():
    """A deterministic statement: refuted at the first request at which the observed mean's own bound is met."""
    good, bad = streams("labels", 0.05, 300, 3)[:100], streams("labels", 0.5, 700, 4)[:100]
    for x in np.concatenate([good, bad], axis=1):
        audit = Audit(PAC)
        means = x.cumsum() / np.arange(1, len(x) + 1)
        due = next(i + 1 for i, m in enumerate(means) if m > 0.1 and audit.requests_to_refute(m) <= i + 1)
        found = refuted_after(audit, x)
        assert found is not None and found <= due < 1000


@pytest.mark.slow
def test_marginal_contracts_are_not_refuted_by_calibrations_that_were_merely_unlucky():
    """Whole life: calibrate, then serve the same distribution; at the plain level a third would be called broken."""
    rng = np.random.default_rng(5)
    contract, wrong = marginal(199, 0.1), np.zeros((199, 1), bool)
    level_alone = Contract("label disagreement", 0.1, 0.95, 199, "as if it had a confidence")
    refuted = np.zeros(2)
    for _ in range(RUNS):
        threshold = conformal(rng.random((199, 1)), wrong, 0.1, "unconditional")[0]
        losses = (rng.random(4000) >= threshold).astype(float)
        for i, which in enumerate((contract, level_alone)):
            refuted[i] += refuted_after(Audit(which), losses) is not None
    assert refuted[0] / RUNS <= 0.05 + THREE_ERRORS
    assert refuted[1] / RUNS > 0.1
    assert refuted_after(Audit(contract), streams("labels", 0.3, 500, 6)[0]) is not None


def test_conditional_risk_quantile():
    assert marginal(199, 0.1).audited_level(0.05) == pytest.approx(stats.beta(20, 180).ppf(0.95))
    split = marginal(199, 0.1, "independent", parts=2).audited_level(0.05)
    assert split == pytest.approx(2 * stats.beta(10, 190).ppf(0.975))
    assert PAC.audited_level(0.05) == 0.1


# ---- what it decides


def test_decision_is_the_callers_and_stays():
    for on_violation, allowed in (("warn", True), ("full_depth", False)):
        audit = Audit(PAC, on_violation=on_violation)
        audit.observe([])
        assert audit.interval() == (0.0, 1.0) and audit.exits_allowed
        with pytest.warns(
            RuntimeWarning, match="refuted after 2 audited requests with a mean loss of 1.000, audited at 0.1"
        ):
            audit.observe(np.ones(6))
        assert audit.refuted and audit.exits_allowed is allowed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            audit.observe(np.zeros(1000))  # said once; good luck later does not restore it
            audit.observe(np.ones(500))
        assert audit.refuted and audit.exits_allowed is allowed


def test_evidence_inside_a_batch_counts():
    """Refuted in its midst although the end of the batch looks good again, as it would be request by request."""
    audit = Audit(PAC)
    with pytest.warns(RuntimeWarning, match="refuted after 2 audited"):
        audit.observe(np.concatenate([np.ones(6), np.zeros(1000)]))
    assert audit.refuted and audit.count == 1006


def test_batches_do_not_matter_and_the_interval_holds_the_mean():
    x = streams("labels", 0.07, 500, 7)[0]
    whole, single = Audit(PAC), Audit(PAC)
    whole.observe(x)
    for loss in x:
        single.observe([loss])
    assert (whole.count, whole.total, whole.refuted) == (single.count, single.total, single.refuted)
    low, high = whole.interval()
    assert low < x.mean() < high and evidence(whole.total, 500, low) == pytest.approx(math.log(20), abs=1e-6)
    for constant in (0.0, 1.0):
        audit = Audit(PAC_TOKENS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            audit.observe(np.full(50, constant))
        low, high = audit.interval()
        assert low <= constant <= high and high - low < 0.1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: Audit(PAC, alpha=0), "alpha must lie strictly between 0 and 1, got 0"),
        (lambda: Audit(PAC, on_violation="stop"), "on_violation must be one of warn, full_depth, got 'stop'"),
        (lambda: Audit(PAC).observe([0.5, 2.0]), r"losses must lie in 0\.\.1, got 2"),
        (lambda: Audit(PAC).observe([math.nan]), "losses must be numbers, got NaN"),
        (lambda: Audit(PAC).requests_to_refute(0.1), "risk must lie above the audited level 0.1 and within 1, got 0.1"),
        (lambda: marginal(18, 0.05), "a marginal contract at this level needs at least 19 examples, got 18"),
        (lambda: Contract("r", 0.1, "high", 9, "m"), "confidence must be a number or 'marginal', got 'high'"),
        (lambda: Contract("r", 0.1, 0.9, 0, "m"), "n and parts must be at least 1, got 0 and 1"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
