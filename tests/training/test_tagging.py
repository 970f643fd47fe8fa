"""Training taggers: the loss of both stages by hand; words halt in training as they do when the tagger runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="taggers are its models")

from encoder_zoo import CLASSES, build, rows
from exeunt.states import Freeze
from exeunt.training import SelfSampling, Tagging, adamw, fit
from exeunt.words import words_of
from word_oracle import Row, oracle, random_words, tagger_heads


def case(count=10, longest=16, name="bert"):
    model = build(name, "ForTokenClassification")
    ids, mask, lengths = rows(count, longest=longest, seed=2)
    words = random_words(lengths, 3, longest)
    labels = torch.randint(CLASSES, ids.shape, generator=torch.Generator().manual_seed(5)).masked_fill(words == 0, -100)
    return model, tagger_heads(model, spread=1.5), (ids, mask, words, labels)


def test_the_first_stage_weighs_depths():
    model, heads, batch = case()
    tagging = Tagging(model, heads).eval()
    found = tagging.logits(*batch[:2])
    want = sum((e + 1) * F.cross_entropy(z.flatten(0, 1), batch[3].flatten()) for e, z in found.items()) / 21
    assert torch.allclose(tagging(batch), want) and list(found) == [0, 1, 2, 3, 4, 5]
    flooded = Tagging(model, heads, flood=float(want.detach()) + 1).eval()
    assert torch.allclose(flooded(batch), torch.tensor(1.0), atol=1e-5)


def test_words_halt_where_the_first_stage_is_sure():
    model, heads, (ids, mask, words, _) = case()
    tagging, sampling, flat = Tagging(model, heads).eval(), SelfSampling((1, 3, 7), 0.95), words_of(words, mask)
    doubts = tagging.doubts(ids, mask, flat)
    torch.manual_seed(1)
    window, delta = sampling.draw(len(ids))
    assert int(window[0]) == 1 and float(delta[1]) == pytest.approx(0.95) and not delta[2:6].any()
    left = sampling.halts(doubts, flat, window, delta, 5)
    k = 0
    for r in range(len(ids)):
        row = Row(words[r][mask[r].bool()])
        for j in range(len(row)):
            near = row.window(j, int(window[r]))
            worst = {e: max(float(doubts[e][k - j + i]) for i in near) for e in heads}
            want = next((e for e in heads if worst[e] < float(delta[r])), 5)
            assert int(left[k]) == want
            k += 1
    assert k == len(left) and len(left.unique()) > 2
    assert bool((left[(flat.row >= 2) & (flat.row < 6)] == 5).all())


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_halted_words_are_trained_as_they_run(norm):
    model, heads, (ids, mask, words, _) = case(4)
    tagging, flat = Tagging(model, heads, state=Freeze(norm)).eval(), words_of(words, mask)
    g = torch.Generator().manual_seed(0)
    halts = torch.randint(0, 6, (len(flat),), generator=g)
    halts[torch.searchsorted(flat.row, torch.arange(4))] = 5  # a word of each row stays
    left = torch.full(ids.shape, 5)
    left.view(-1)[flat.place[flat.word >= 0]] = halts[flat.word[flat.word >= 0]]
    with torch.no_grad(), tagging._freezing(left):
        found = tagging.logits(ids, mask)
    for r in range(4):
        n, own = int(mask[r].sum()), halts[flat.row == r].tolist()

        def decide(layer, row, logits, halted, own=own):
            return [e == layer for e in own], 1.0

        want, depth, _ = oracle(model, heads, ids[r, :n], words[r, :n], decide, norm=norm)
        got = torch.stack([found[int(depth[t])][r, t] for t in range(n)])
        assert torch.equal(depth, left[r, :n]) and float((got - want).abs().max()) < 2e-5


def test_the_second_stage_counts_words_that_go_on():
    model, heads, batch = case()
    first = Tagging(model, heads).eval()
    second = Tagging(model, heads, sampling=SelfSampling((1,), 0.95), sampler=copy.deepcopy(first)).eval()
    torch.manual_seed(3)
    got = second(batch)
    torch.manual_seed(3)
    ids, mask, words, labels = batch
    flat = words_of(words, mask)
    halts = second.sampling.halts(first.doubts(ids, mask, flat), flat, *second.sampling.draw(len(ids)), 5)
    left = torch.full(ids.shape, 5)
    left.view(-1)[flat.place[flat.word >= 0]] = halts[flat.word[flat.word >= 0]]
    with second._freezing(left):
        found = second.logits(ids, mask)
    want = 0.0
    for e, z in found.items():
        counted = (left >= e) & (labels >= 0)
        want = want + (e + 1) / 21 * F.cross_entropy(z[counted], labels[counted])
    assert torch.allclose(got, want, atol=1e-6) and len(left.unique()) > 2
    assert not any(p.requires_grad for p in second.sampler.parameters())


def test_both_stages_fit(tmp_path):
    model, heads, batch = case()
    first = Tagging(model, heads)
    common = dict(steps=12, warmup=2, identity={}, progress=False)
    before = float(first.eval()(batch))
    fit(first, lambda step: batch, tmp_path / "one", optimizers=adamw(first, 1e-2), **common)
    middle = float(first.eval()(batch))
    second = Tagging(model, heads, sampling=SelfSampling(), sampler=copy.deepcopy(first))
    fit(second, lambda step: batch, tmp_path / "two", optimizers=adamw(second, 1e-2), **common)
    assert float(first.eval()(batch)) < middle < before


def test_what_is_refused():
    model, heads, _ = case(2)
    with pytest.raises(ValueError, match="expected a sampler along with sampling"):
        Tagging(model, heads, sampling=SelfSampling())
    with pytest.raises(ValueError, match=r"windows must be odd, got \[5, 6\]"):
        SelfSampling((5, 6))
    with pytest.raises(ValueError, match="delta must lie in 0..1, got 1.5"):
        SelfSampling(delta=1.5)
