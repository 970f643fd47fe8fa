"""Recorded tokens: the model's own statistics at every exit, and estimates beside a live run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="a language model is needed")

import exeunt
from exeunt.evaluation import live_check, record_tokens
from exeunt.policies import FixedDepth
from exeunt.recipes import Recipe
from exeunt.replay import replay
from exeunt.states import Propagate
from oracle import tiny_llama

EXITS, PROMPT = (1, 3), 4


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def text(rows=5, length=16):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def test_statistics_are_the_models(model):
    ids = text()
    recording = record_tokens(model, ids, EXITS, prompt=PROMPT, batch=2, progress=False)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        at_exits = [model.lm_head(model.model.norm(out.hidden_states[e + 1])) for e in EXITS]
    for k, logits in enumerate([*at_exits, out.logits]):
        expected = exeunt.ExitStats.from_logits(logits[:, PROMPT:-1].flatten(0, 1))
        got = recording.stats(k)
        assert torch.equal(got.argmax, expected.argmax)
        assert torch.allclose(got.max_prob, expected.max_prob, atol=1e-5)
    cosine = torch.cosine_similarity(*(out.hidden_states[e][:, PROMPT:-1].flatten(0, 1) for e in (1, 2)))
    assert torch.allclose(recording.measures["saturation"][:, 0], cosine, atol=1e-5)
    assert recording.labels.tolist() == ids[:, PROMPT + 1 :].flatten().tolist() and recording.limit == 12


def test_fixed_depth_is_exact_on_the_recorded_words(model):
    """Prompt at full depth, every later token at one depth: as the recording has it, fed word by word."""
    ids = text(1)
    recording = record_tokens(model, ids, EXITS, prompt=PROMPT, progress=False)
    recipe = Recipe(EXITS, None, FixedDepth(3), Propagate())
    told = replay(recording, recipe)
    assert told.exact and (told.depth == 3).all()
    with exeunt.attach(model, recipe), torch.no_grad():
        out, said = model(ids[:, :PROMPT], use_cache=True), []
        for t in range(PROMPT, ids.shape[1] - 1):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            said.append(int(out.logits[0, -1].argmax()))
    assert said == told.label.tolist()


def test_estimates_stand_beside_a_live_run(model):
    recording = record_tokens(model, text(), EXITS, prompt=PROMPT, progress=False)
    told = replay(recording, exeunt.recipes.calm(EXITS, 0.02))
    assert not told.exact
    said = live_check(model, told, text(2, 5), tokens=6)
    assert said.startswith("Live, 10 generated tokens: ") and f"{told.mean_layers:.2f} layers" in said
    with pytest.raises(ValueError, match="expected the model that was recorded, got another"):
        live_check(tiny_llama(seed=1), told, text(2, 5))


def test_exits_are_checked_before_the_model_runs(model):
    layers = len(model.model.layers)
    with pytest.raises(ValueError, match=rf"^exits must lie in 0\.\.{layers - 2} for a model of {layers} layers, got"):
        record_tokens(model, text(), [1, 40], progress=False)
    assert record_tokens(model, text(1), [3, 1, 3], progress=False).exits == (1, 3)


def test_prompts_leave_something_to_predict(model):
    with pytest.raises(ValueError, match="must leave tokens to predict in rows of 16, got 16"):
        record_tokens(model, text(), EXITS, prompt=16)
