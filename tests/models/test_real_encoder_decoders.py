"""Marian (annalog) and Whisper base with their trained weights, out of installed packages."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers models")
import exeunt
import real_models

pytestmark = pytest.mark.real_models


@pytest.fixture(scope="module")
def marian():
    model, vocabulary = real_models.annalog()
    return model, vocabulary, real_models.smiles("CC(=O)Nc1ccc(O)cc1", vocabulary)


def written(ids, vocabulary):
    names = {i: token for token, i in vocabulary.items()}
    return ["".join(names[i] for i in row if not names[i].startswith("<")) for row in ids.tolist()]


def test_paracetamol_has_analogues(marian):
    model, vocabulary, ids = marian
    said = written(model.generate(ids, max_new_tokens=60, num_beams=4, num_return_sequences=4), vocabulary)
    assert all("c1ccc(" in s for s in said) and len(set(said)) == 4


@pytest.mark.parametrize("way", [{}, dict(num_beams=4, num_return_sequences=4)], ids=["greedy", "beams"])
def test_marian_is_identical_while_nothing_leaves(marian, way):
    model, _, ids = marian
    settings = dict(max_new_tokens=40, return_dict_in_generate=True, output_logits=True, **way)
    plain = model.generate(ids, **settings)
    with exeunt.attach(model, exeunt.recipes.calm([0, 1], math.inf)):
        got = model.generate(ids, **settings)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))


def test_marian_leaves_early_and_still_writes_a_molecule(marian):
    model, vocabulary, ids = marian
    plain = model.generate(ids, max_new_tokens=60)
    with exeunt.attach(model, exeunt.recipes.calm([1], 0.9)) as early:
        got = model.generate(ids, max_new_tokens=60)
    assert early.report().histogram[1] > 0 and early.report().layers_per_token < 3
    assert written(got, vocabulary)[0][:4] == written(plain, vocabulary)[0][:4]


def test_whisper_is_identical_while_nothing_leaves_and_faster_when_all_do():
    model = real_models.whisper()
    heard = dict(input_features=torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0)))
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    plain = model.generate(**heard, **settings)
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], math.inf)) as early:
        assert torch.equal(model.generate(**heard, **settings), plain)
        assert early.report().layer_rows == early.report().full_layer_rows > 0
    with exeunt.attach(model, exeunt.recipes.calm([1], 0.0)) as early:
        model.generate(**heard, **settings)
    assert early.report().histogram.keys() == {1} and early.report().layers_per_token == 2
