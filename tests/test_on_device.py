"""Exits on a model that lies on a GPU give what they give on the CPU: on a real one, and on one pretended here."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers models")
from transformers import DynamicCache

import backends
import exeunt
import pretended_cuda
from encoder_zoo import CLASSES, build, rows
from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.confidence import measure
from exeunt.policies import Threshold
from exeunt.recipes import Recipe, tokee
from exeunt.states import Defer, Drop, Evict, Propagate, Recompute
from oracle import prompts, tiny_llama
from word_oracle import random_words, tagger_heads

EXITS = [0, 2, 4]
STATES = [Propagate(), Propagate(lazy=True), Defer(), Recompute(3), Evict()]


class Real:
    """A CUDA device."""

    @staticmethod
    def put(it):
        return {k: v.cuda() for k, v in it.items()} if isinstance(it, dict) else copy.deepcopy(it).cuda()


class Pretended:
    """None at all (:mod:`pretended_cuda`)."""

    @staticmethod
    def put(it):
        if isinstance(it, dict):
            return {k: pretended_cuda.There(v.clone()) for k, v in it.items()}
        return pretended_cuda.move(copy.deepcopy(it))


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not backends.on_device():
            pytest.skip("needs a CUDA device and exeunt._cuda")
        yield Real
        return
    with pretended_cuda.device(monkeypatch):
        yield Pretended


def llama(attention):
    exeunt.register_attention()
    return tiny_llama(6, attn_implementation=attention)


def recipe_of(state, threshold=0.3, confidence="margin"):
    return dataclasses.replace(exeunt.recipes.calm(EXITS, threshold, confidence=confidence), state=state)


def generated(model, inputs, recipe, **kw):
    torch.manual_seed(3)
    settings = {"max_new_tokens": 10, "do_sample": False, **kw}
    with exeunt.attach(model, recipe) as early:
        out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
        report = early.report()
        return out.sequences.cpu(), torch.stack(out.logits).cpu(), torch.cat(report.exit_layers).cpu(), report


def assert_same(got, want):
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)
    for name in ("layer_rows", "fill_ins", "late_rows", "head_reads", "checks"):
        assert getattr(got[3], name) == getattr(want[3], name), name
    assert len(want[3].histogram) > 1


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("attention", ["exeunt", "sdpa"])
def test_generation(device, attention, state):
    model = llama(attention)
    want = generated(model, prompts(4), recipe_of(state))
    got = generated(device.put(model), device.put(prompts(4)), recipe_of(state))
    assert_same(got, want)
    if isinstance(state, Propagate):
        assert got[3].graphs["replayed"] > 10 and not any("eager" in what for what in got[3].graphs)
        assert got[3].captures == 0, "kv_fill serves"
    if attention == "exeunt" and not isinstance(state, Evict):
        assert [*got[3].attention] == ["ragged_attention"]


@pytest.mark.parametrize("confidence, threshold", [("saturation", 0.8), ("max_prob", 0.5), ("neg_entropy", -1.5)])
def test_measures(device, confidence, threshold):
    model, recipe = llama("exeunt"), recipe_of(Propagate(), threshold, confidence)
    want = generated(model, prompts(4), recipe)
    assert_same(generated(device.put(model), device.put(prompts(4)), recipe), want)


@pytest.mark.parametrize("kw", [dict(num_beams=3), dict(eos_token_id=list(range(3, 40)), pad_token_id=0)], ids=str)
@pytest.mark.parametrize("state", [Propagate(lazy=True), Defer()], ids=str)
def test_rows_that_move_and_end(device, state, kw):
    model = llama("exeunt")
    want = generated(model, prompts(4), recipe_of(state), **kw)
    assert_same(generated(device.put(model), device.put(prompts(4)), recipe_of(state), **kw), want)


def test_classifier(device):
    model = build("bert")
    torch.manual_seed(2)
    heads = ClassifierHeads({e: LinearHead(32, CLASSES) for e in range(5)})
    ids, mask, _ = rows(9)
    found = []
    for put in (lambda it: it, device.put):
        own = put(heads)
        recipe = Recipe(tuple(own), measure("max_prob"), Threshold(0.45), Drop(), own)
        there, given = put(model), put(dict(input_ids=ids, attention_mask=mask))
        with torch.no_grad(), exeunt.attach(there, recipe) as early:
            found.append((there(**given).logits.cpu(), torch.cat(early.report().exit_layers)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[1][1], found[0][1]) and len(found[0][1].unique()) > 1


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_tagger(device, norm):
    model = build("bert", "ForTokenClassification")
    heads = tagger_heads(model, spread=1.5)
    ids, mask, lengths = rows(6, longest=20, seed=1)
    words, found = random_words(lengths, 1, ids.shape[1]), []
    for put in (lambda it: it, device.put):
        there, given = put(model), put(dict(input_ids=ids, attention_mask=mask, words=words))
        with torch.no_grad(), exeunt.attach(there, tokee(0.86, window=3, norm=norm, heads=put(heads))) as early:
            found.append((there(**given).logits.cpu(), early.depths.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[1][1], found[0][1]) and len(found[0][1].unique()) > 2


def test_a_step_waits_once_for_each_exit(device):
    """Beside what the model itself and the loop around it read: how many rows stay."""
    if device is Real:
        pytest.skip("counted on the pretended device")
    model, cache = device.put(llama("exeunt")), DynamicCache()
    with torch.no_grad(), exeunt.attach(model, recipe_of(Propagate(), 0.3)) as early:
        given = device.put(prompts(4))
        model(**given, past_key_values=cache)
        ids = device.put(dict(ids=torch.full((4, 1), 5)))["ids"]
        for _ in range(4):
            model(ids, past_key_values=cache)
        pretended_cuda.Device.reads.clear()
        model(ids, past_key_values=cache)
        reads, looked = Counter(pretended_cuda.Device.reads), early.report().checks
    own = {line: n for line, n in reads.items() if not line.startswith(("kv_fill.py", "compact.py"))}
    assert set(own) == {"step.py: gone = int(go.sum())"} and 1 <= own.popitem()[1] <= len(EXITS), (reads, looked)
