"""Losses from live runs, what is made of them, and requests that are held against full depth."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import exeunt
from exeunt.calibration import Audit, Calibration, Contract, calibrating, fingerprints, learn_then_test
from exeunt.calibration.live import RISKS, live_losses, units, until_end
from exeunt.calibration.shadow import RISKS as RISKS_AUDITED
from exeunt.calibration.shadow import Shadow

EXITS, PROMPT = (1, 3), 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=7, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(1).integers(1, 60, (24, 16))


def recipe(threshold=0.5):
    return exeunt.recipes.calm(EXITS, threshold, lazy=True)


class Words:
    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids)


def token_by_token(model, text, threshold):
    """What would be said after each token behind the prompt, one text and one token at a time."""
    ids = torch.from_numpy(text)[None]
    said = []
    with exeunt.attach(model, exeunt.recipes.calm(EXITS, threshold)), torch.no_grad():
        out = model(ids[:, :PROMPT], use_cache=True)
        for k in range(PROMPT, ids.shape[1] - 1):
            out = model(ids[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
            said.append(int(out.logits[0, -1].argmax()))
    return said


def test_forced_losses_are_those_of_one_text_at_a_time(model, texts):
    grid = [math.inf, 0.6, 0.3, 0.0]
    live = live_losses(model, recipe(), texts, grid, prompt=PROMPT, batch=7)
    assert live.losses.shape == (4, len(texts)) and not live.losses[0].any() and live.layers[0] == 6
    assert live.losses[3].mean() > 0.1, "a test of nothing: no exit changes a token"
    for k, threshold in enumerate(grid):
        for text, loss in zip(texts[:6], live.losses[k], strict=False):
            full, early = token_by_token(model, text, math.inf), token_by_token(model, text, threshold)
            assert loss == pytest.approx(np.mean(np.array(full) != early))


@pytest.mark.parametrize("risk", RISKS)
def test_every_risk_is_none_at_full_depth_and_some_at_the_first_exit(model, texts, risk):
    if risk in ("rouge-l", "bleu"):
        pytest.importorskip("rouge_score")
        pytest.importorskip("sacrebleu")
    live = live_losses(model, recipe(), texts, [math.inf, 0.0], risk, prompt=PROMPT, tokenizer=Words())
    assert live.losses[0] == pytest.approx(np.zeros(len(texts)), abs=1e-9) and live.losses[1].mean() > 0.05
    assert model.generation_config.eos_token_id == 7, "it was not put back"


def test_what_ends_a_text_ends_the_comparison():
    assert until_end(torch.tensor([[1, 7, 3], [1, 2, 3]]), [7, 9]) == [[1, 7], [1, 2, 3]]


def test_looser_candidates_are_not_run_after_one_has_failed(model, texts):
    asked = []

    def ended(losses):
        asked.append(losses.shape)
        return len(losses) == 2

    live = live_losses(model, recipe(), texts, [0.9, 0.6, 0.3, 0.0], prompt=PROMPT, ended=ended)
    assert asked == [(1, 24), (2, 24)] and len(live.losses) == len(live.layers) == 2


@pytest.mark.parametrize("method", calibrating.METHODS)
def test_stopping_early_chooses_what_all_candidates_would(model, texts, method, monkeypatch):
    grid, level = [math.inf, 0.8, 0.6, 0.4, 0.2, 0.0], 0.3
    found = calibrating.calibrate(
        model, recipe(), texts, grid, level=level, confidence=0.8, method=method, prompt=PROMPT
    )
    whole = live_losses(model, recipe(), texts, grid, prompt=PROMPT).losses
    confidence = None if method == "crc" else 0.8
    row = calibrating._choose(whole, level, confidence, method, grid)
    assert found.threshold == (math.inf if row is None else grid[row])
    assert len(found.live.losses) <= len(grid)
    again = calibrating.calibrate(
        model, recipe(), texts, grid, level=level, confidence=0.8, method=method, prompt=PROMPT
    )
    assert again.threshold == found.threshold and (again.live.losses == found.live.losses).all()


def test_a_calibration_goes_to_attach_and_is_refused_elsewhere(model, texts, tmp_path):
    found = calibrating.calibrate(model, recipe(), texts, [0.9, 0.5], level=0.6, confidence=0.8, prompt=PROMPT)
    assert found.calibration.contract.unit == "prompt" and found.calibration.contract.n == len(texts)
    found.calibration.save(tmp_path / "c.json")
    with exeunt.attach(model, recipe(), calibration=tmp_path / "c.json") as early:
        assert early.recipe.policy.value == found.threshold
    with pytest.raises(ValueError, match="belongs to another recipe"):
        exeunt.attach(
            model, exeunt.recipes.calm([2], 0.5, lazy=True), calibration=Calibration.load(tmp_path / "c.json")
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "guess"}, "method must be one of ltt, wsr, crc, got 'guess'"),
        ({"risk": "taste"}, "risk must be one of next-token, token, rouge-l, bleu, got 'taste'"),
        ({"candidates": []}, "candidates must be one threshold or more, got none"),
        ({"candidates": [0.5, 0.9]}, "candidates must descend from safe to loose, got 0.5 before 0.9"),
        ({"level": 0.01}, r"at this level needs at least \d+ examples, got 24"),
        ({"confidence": None}, "method 'ltt' needs a confidence between 0 and 1, got none"),
        ({"prompt": 15}, r"at least 2 tokens behind a prompt of 15, got shape \[24, 16\]"),
        ({"risk": "bleu"}, "risk 'bleu' compares words: expected a tokenizer, got none"),
    ],
)
def test_bad_input_gets_one_sentence_before_anything_runs(model, texts, change, sentence, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("it ran"))
    options = {"candidates": [0.9, 0.5], "level": 0.3, "prompt": PROMPT} | change
    with pytest.raises(ValueError, match=sentence):
        calibrating.calibrate(model, recipe(), texts, options.pop("candidates"), **options)


def test_units_share_no_token_and_follow_the_seed():
    first, second = units(range(1000), 10, 40, seed=3), units(range(1000), 10, 40, seed=4)
    assert len(set(first.ravel())) == 400 and (first == units(range(1000), 10, 40, seed=3)).all()
    assert not (first == second).all()
    with pytest.raises(ValueError, match=r"expected 101 pieces of 10 tokens, got 1000 tokens \(100 pieces\)"):
        units(range(1000), 10, 101)


def test_what_was_trained_on_is_refused_however_it_is_cut():
    text = np.random.default_rng(0).integers(0, 4000, 200_000)
    trained = fingerprints.sketch(text[:100_000])
    for shift in (0, 17, 101):
        with pytest.raises(ValueError, match=r"must be apart from training data, got 100% of its phrases in both"):
            fingerprints.refuse_trained(text[shift : shift + 64_000].reshape(-1, 160), trained)
    fingerprints.refuse_trained(text[100_000:196_000].reshape(-1, 160), trained)
    half = np.concatenate([text[:48_000], text[100_000:148_000]]).reshape(-1, 160)
    with pytest.raises(ValueError, match="must be apart"):
        fingerprints.refuse_trained(half, trained)
    rows = fingerprints.sketch(text[:100_000].reshape(-1, 500))  # rows of training, the phrases across their ends lost
    with pytest.raises(ValueError, match="must be apart"):
        fingerprints.refuse_trained(text[17 : 17 + 64_000].reshape(-1, 160), rows)


def contract(risk="next-token disagreement", level=0.05):
    return Contract(risk, level, 0.95, 400, "learn_then_test, hoeffding_bentkus", "prompt")


@pytest.mark.parametrize("risk", RISKS_AUDITED)
def test_shadow_of_a_recipe_that_never_exits_sees_no_loss(model, texts, risk):
    audit = Audit(contract(risk))
    prompts = torch.from_numpy(texts[:, :PROMPT])
    with exeunt.attach(model, recipe(math.inf)) as early:
        shadow = Shadow(early, audit, fraction=1.0, tokenizer=Words())
        for part in prompts.split(8):
            shadow.generate(part, max_new_tokens=6, pad_token_id=0)
    assert (audit.count, shadow.requests, audit.refuted) == (24, 24, False)
    assert audit.total == pytest.approx(0.0, abs=1e-6)


def test_refuted_it_falls_back_to_full_depth_and_loses_nothing(model, texts):
    prompts = torch.from_numpy(texts[:, :PROMPT])
    options = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    mask = {"attention_mask": torch.ones_like(prompts)}
    stock = model.generate(prompts, **mask, **options)
    with exeunt.attach(model, recipe(0.0)) as early:
        exited = model.generate(prompts, **mask, **options)
        audit = Audit(contract(level=0.01), on_violation="full_depth")
        shadow = Shadow(early, audit, fraction=1.0)
        with pytest.warns(RuntimeWarning, match="contract refuted"):
            for _ in range(20):
                out = shadow.generate(prompts, **options)
                assert torch.equal(out, exited), "the audited request was touched"
                if audit.refuted:
                    break
        assert audit.refuted and not audit.exits_allowed
        count = audit.count
        assert torch.equal(shadow.generate(prompts, **options), stock)
        assert audit.count == count, "full depth against full depth tells nothing"
        assert torch.equal(model.generate(prompts, **mask, **options), exited), "it stayed paused"


def test_a_share_of_the_requests_is_looked_at_and_padding_changes_nothing(model, texts):
    audit = Audit(contract(level=0.9))
    with exeunt.attach(model, recipe(0.0)) as early:
        shadow = Shadow(early, audit, fraction=0.25, seed=5)
        for _ in range(4):
            shadow.generate(torch.from_numpy(texts[:, :PROMPT]), max_new_tokens=3, pad_token_id=0)
        expected = int((np.random.default_rng(5).random(96) < 0.25).sum())
        assert (audit.count, shadow.requests) == (expected, 96)
        whole, padded = Audit(contract(level=0.9)), Audit(contract(level=0.9))
        ids = torch.from_numpy(texts[:4, :PROMPT])
        Shadow(early, whole, fraction=1.0).generate(ids, max_new_tokens=6, pad_token_id=0)
        left = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
        mask = (torch.arange(left.shape[1]) >= 3).long().expand_as(left)
        Shadow(early, padded, fraction=1.0).generate(left, attention_mask=mask, max_new_tokens=6, pad_token_id=0)
        assert whole.total == pytest.approx(padded.total)


def test_requests_beyond_the_level_refute_the_contract_as_soon_as_theory_says_and_others_do_not(model):
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 60, (300, PROMPT)))
    with exeunt.attach(model, recipe(0.35)) as early, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def watched(level):
            audit = Audit(contract(level=level))
            shadow = Shadow(early, audit, fraction=1.0)
            for part in ids.split(50):
                shadow.generate(part, max_new_tokens=6, pad_token_id=0)
            return audit

        risk = watched(0.9).total / len(ids)
        assert 0.02 < risk < 0.5
        broken = watched(risk / 4)
        assert broken.requests_to_refute(risk) <= 300 and broken.refuted
        assert not watched(risk * 1.3).refuted


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda early: Shadow(early, Audit(contract()), fraction=1.5), r"fraction must lie in 0\.\.1, got 1\.5"),
        (lambda early: Shadow(early, Audit(contract("label disagreement"))), "expected a contract of next-token"),
        (lambda early: Shadow(early, Audit(contract("1 - BLEU"))), "expected a tokenizer, got none"),
        (
            lambda early: Shadow(early, Audit(contract())).generate(torch.ones(1, 2).long(), do_sample=True),
            "shadow runs compare greedy generations that return ids",
        ),
    ],
)
def test_bad_shadows_get_one_sentence(model, make, sentence):
    with exeunt.attach(model, recipe()) as early, pytest.raises(ValueError, match=sentence):
        make(early)


def test_the_choice_is_the_methods_own(texts):
    losses = np.zeros((3, 200))
    losses[1, :10], losses[2, :60] = 1, 1
    assert calibrating._choose(losses, 0.1, 0.95, "ltt", [3, 2, 1]) == learn_then_test(losses, 0.1, 0.95) == 1


# ---- by replay


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
    tokens = recorded(positions=np.arange(400))
    with pytest.raises(ValueError, match="replay is an estimate here"):
        calibrating.calibrate_recorded(encoder, exeunt.recipes.calm([0, 1]), tokens, grid, level=0.3)
