"""Losses from live runs, what is made of them, and requests that are held against full depth."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

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


@pytest.mark.parametrize("setting", ["bfloat16", "penalty"])
def test_full_depth_has_no_loss_whatever_it_is_rounded_to_or_penalised_by(model, texts, setting):
    model = copy.deepcopy(model)
    if setting == "bfloat16":
        model = model.bfloat16()
    else:
        model.generation_config.repetition_penalty = 1.3
    longer = np.concatenate([texts, texts[::-1]], 1)
    live = live_losses(model, recipe(), longer, [math.inf, 0.0], prompt=PROMPT)
    assert not live.losses[0].any() and live.losses[1].mean() > 0.1


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


def test_where_nothing_passes_it_is_full_depth_that_was_run(model, texts):
    counted = []
    found = calibrating.calibrate(
        model, recipe(), texts, [0.0], level=0.2, confidence=0.9, prompt=PROMPT, batch=24, advance=counted.append
    )
    assert found.threshold == math.inf and counted == [24] * 3  # the model alone, without exits, the candidate
    assert len(found.live.losses) == len(found.live.layers) == 1 and found.live.losses.mean() > 0.2


def test_a_risk_that_full_depth_does_not_keep_is_refused(model, texts, monkeypatch):
    """Were the kernels of two runs to differ, say."""
    never = lambda *a, **k: calibrating.Live(np.full((1, 24), 0.5), [6.0])  # noqa: E731
    monkeypatch.setattr(calibrating, "live_losses", never)
    for method, sentence in (
        (
            "ltt",
            "not even without any exit is next-token disagreement shown to be at most 0.3: it is 0.5 on 24 prompts",
        ),
        ("crc", "method 'crc' needs losses that full depth does not have, got 0.5 without any exit"),
    ):
        with pytest.raises(ValueError, match=sentence):
            calibrating.calibrate(model, recipe(), texts, [0.9, 0.5], level=0.3, method=method, prompt=PROMPT)


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


def shadowed(model, threshold, ids, **options):
    """The audit of one batch that was looked at as a whole."""
    audit = Audit(contract(level=0.9))
    with exeunt.attach(model, recipe(threshold)) as early:
        out = Shadow(early, audit, fraction=1.0).generate(ids, pad_token_id=0, **options)
    return audit, out


def test_both_sides_have_the_options_of_the_request(model, texts):
    ids = torch.from_numpy(texts[:, :PROMPT])
    _, out = shadowed(model, math.inf, ids, max_new_tokens=12)
    ends = out[:6, PROMPT + 3].tolist()
    own = GenerationConfig(max_new_tokens=12, repetition_penalty=1.4, eos_token_id=ends, pad_token_id=0)
    for options in (
        {"max_new_tokens": 12, "repetition_penalty": 1.4},
        {"max_new_tokens": 12, "eos_token_id": ends},
        {"generation_config": own},
    ):
        audit, again = shadowed(model, math.inf, ids, **options)
        assert not torch.equal(again[:, : out.shape[1]], out), "a test of nothing: the option changes no word"
        assert audit.count > 12 and audit.total == 0
    penalised = copy.deepcopy(model)
    penalised.generation_config.repetition_penalty = 1.4
    assert shadowed(penalised, math.inf, ids, max_new_tokens=12)[0].total == 0


def test_only_words_that_exits_could_change_count(model, texts):
    """The first comes from the prompt's own forward: of two words one counts, and a request of one shows nothing."""
    ids = torch.from_numpy(texts[:, :PROMPT])
    assert shadowed(model, 0.0, ids, max_new_tokens=1)[0].count == 0
    audit, out = shadowed(model, 0.0, ids, max_new_tokens=2)
    went_on = out[out[:, PROMPT] != 7]
    with torch.no_grad():
        alone = model(went_on[:, :-1]).logits[:, -1].argmax(-1)
    assert audit.count == len(went_on) and audit.total == int((alone != went_on[:, -1]).sum()) > 0


def test_a_streamer_hears_the_answer_alone(model, texts):
    class Heard:
        ends = 0

        def put(self, ids):
            pass

        def end(self):
            self.ends += 1

    heard = Heard()
    shadowed(model, 0.5, torch.from_numpy(texts[:1, :PROMPT]), max_new_tokens=4, streamer=heard)
    assert heard.ends == 1


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


def asked(early, **options):
    return Shadow(early, Audit(contract())).generate(torch.ones(1, 2).long(), max_new_tokens=2, **options)


def test_settings_of_the_model_that_are_not_greedy_are_refused(model):
    beams = copy.deepcopy(model)
    beams.generation_config.num_beams = 3
    with exeunt.attach(beams, recipe()) as early, pytest.raises(ValueError, match="got beam search"):
        asked(early)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda early: Shadow(early, Audit(contract()), fraction=1.5), r"fraction must lie in 0\.\.1, got 1\.5"),
        (lambda early: Shadow(early, Audit(contract("label disagreement"))), "expected a contract of next-token"),
        (lambda early: Shadow(early, Audit(contract("1 - BLEU"))), "expected a tokenizer, got none"),
        (
            lambda early: asked(early, do_sample=True),
            "shadow runs compare greedy generations that return ids, got sample",
        ),
        (lambda early: asked(early, num_beams=2), "got beam search"),
        (lambda early: asked(early, generation_config=GenerationConfig(do_sample=True)), "got sample"),
        (lambda early: asked(early, prompt_lookup_num_tokens=2), "got assisted generation"),
        (lambda early: asked(early, return_dict_in_generate=True), "got a dict"),
    ],
)
def test_bad_shadows_get_one_sentence(model, make, sentence):
    with exeunt.attach(model, recipe()) as early, pytest.raises(ValueError, match=sentence):
        make(early)


def test_the_choice_is_the_methods_own(texts):
    losses = np.zeros((3, 200))
    losses[1, :10], losses[2, :60] = 1, 1
    assert calibrating._choose(losses, 0.1, 0.95, "ltt", [3, 2, 1]) == learn_then_test(losses, 0.1, 0.95) == 1
