"""The model that ships: it is all there, it is what was trained, and its tokens leave."""

import pytest
import torch

import exeunt
from exeunt import small_lm

TEXT = ("The following example shows how to use", "She was not a woman of many words, for,", "Return a new list")


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("transformers", reason="it is a transformers model")
    return small_lm.load()


def inputs(tokenizer):
    return tokenizer(list(TEXT), return_tensors="pt", padding=True)


def test_it_fits_the_wheel_and_says_where_it_comes_from(loaded):
    model, tokenizer = loaded
    assert sum(file.stat().st_size for file in small_lm.FOLDER.iterdir()) <= 30e6
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters <= 15e6 and len(model.model.layers) == 12 and model.config.vocab_size == len(tokenizer) <= 8192
    about = small_lm.training()
    assert "licence" in about["text"] and about["runs"] and len(about["sketch"]) > 100_000
    figures = about["held_out"]
    depths = sorted(map(int, figures))
    assert depths == [1, 3, 5, 7, 9, 11] and figures["11"]["agreement"] == 1.0
    agreement = [figures[str(d)]["agreement"] for d in depths]
    perplexity = [figures[str(d)]["perplexity"] for d in depths]
    assert agreement == sorted(agreement) and perplexity == sorted(perplexity, reverse=True)


@torch.no_grad()
def test_it_has_learnt_its_language(loaded):
    model, tokenizer = loaded
    ids = tokenizer("Return the number of items in the list.", return_tensors="pt").input_ids
    loss = model(ids, labels=ids).loss
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert loss < 5 and model(shuffled, labels=shuffled).loss > loss + 2


def test_tokens_leave_and_a_threshold_that_never_fires_changes_nothing(loaded):
    model, tokenizer = loaded
    options = {**inputs(tokenizer), "max_new_tokens": 24, "do_sample": False}
    stock = model.generate(**options)
    with exeunt.attach(model, exeunt.recipes.calm(small_lm.EXITS, float("inf"), lazy=True)):
        assert torch.equal(model.generate(**options), stock)
    with exeunt.attach(model, exeunt.recipes.calm(small_lm.EXITS, small_lm.THRESHOLD, lazy=True)) as early:
        out = model.generate(**options)
    report = early.report()
    assert report.histogram.get(small_lm.EXITS[0], 0) >= 10 and report.layers_per_token < 11
    begin = options["input_ids"].shape[1]
    mask = torch.cat([options["attention_mask"], torch.ones_like(out[:, begin:])], 1)
    with torch.no_grad():
        full_depth = model(out, attention_mask=mask).logits.argmax(-1)
    assert (full_depth[:, begin - 1 : -1] == out[:, begin:]).float().mean() > 0.9


def test_bfloat16_as_stored(loaded):
    model, tokenizer = small_lm.load(torch.bfloat16)
    stored = model.state_dict()
    assert all(torch.equal(p.bfloat16(), stored[name]) for name, p in loaded[0].state_dict().items())
    assert model.generate(**inputs(tokenizer), max_new_tokens=4, do_sample=False).shape[0] == len(TEXT)
