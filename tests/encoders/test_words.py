"""Words and their neighbours: maps out of tokenizers, windows that end where texts do, any pattern of halting."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", reason="word maps come from its tokenizers")

import exeunt
from encoder_zoo import build
from exeunt.policies import At, Evidence, Sentence, WordPolicy, WordWindow
from exeunt.policies.words import window_min
from exeunt.recipes import Recipe, sentee, tokee
from exeunt.states import Freeze
from exeunt.words import word_map, words_of
from word_oracle import Row, oracle, random_words, tagger_heads, word_pieces

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "##c", "d"]
TOKENIZER = word_pieces(PIECES)

# A row: runs of pieces (a word) or of nothing (special tokens), then padding.
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 3)), min_size=1, max_size=6
)


def batch_of(rows):
    """Word map and mask; a run of 0 is a token of no word."""
    maps = []
    for runs, _ in rows:
        row, number = [], 0
        for size in runs:
            number += size > 0
            row += [number] * size or [0]
        maps.append(row)
    width = max(len(row) + padding for row, (_, padding) in zip(maps, rows, strict=True))
    words = torch.tensor([row + [0] * (width - len(row)) for row in maps])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in maps])
    return words, mask


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_words_are_found_where_they_are(rows):
    words, mask = batch_of(rows)
    found = words_of(words, mask)
    assert found.place.tolist() == mask.reshape(-1).nonzero()[:, 0].tolist()
    k, seen = 0, []
    for r in range(len(words)):
        row = Row(words[r][mask[r].bool()])
        for pieces, segment in zip(row.pieces, row.segments, strict=True):
            first = int(found.place[found.first[k]])
            assert (first // words.shape[1], first % words.shape[1]) == (r, pieces[0]) and int(found.row[k]) == r
            assert found.place[found.word == k].tolist() == [r * words.shape[1] + t for t in pieces]
            seen.append((r, segment))
            k += 1
    assert k == len(found)
    numbered = [sorted(set(seen)).index(s) for s in seen]
    assert found.segment.tolist() == numbered


@settings(max_examples=40, deadline=None)
@given(ROWS, st.data())
def test_words_that_are_kept_stay_themselves(rows, data):
    words, mask = batch_of(rows)
    found = words_of(words, mask)
    stay = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words))))
    tokens, chosen = stay[found.place // words.shape[1]], stay[found.row]
    kept = found.keep(tokens, chosen)
    again = words_of(words * stay[:, None], mask * stay[:, None]) if stay.any() else None
    if again is None:
        assert len(kept) == len(kept.place) == 0
        return
    assert torch.equal(kept.place, again.place) and torch.equal(kept.word, again.word)
    assert torch.equal(kept.first, again.first) and torch.equal(kept.row, again.row)
    assert len(kept.segment) < 2 or torch.equal(kept.segment.diff() > 0, again.segment.diff() > 0)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 8), st.integers(0, 99))
def test_windows_end_where_neighbours_do(rows, half, seed):
    found = words_of(*batch_of(rows))
    score = torch.rand(len(found), generator=torch.Generator().manual_seed(seed))
    score[score < 0.1] = math.nan
    got, known = window_min(score, found.segment, 2 * half + 1), score.nan_to_num(nan=-math.inf)
    for j in range(len(found)):
        near = [k for k in range(max(0, j - half), min(len(found), j + half + 1))]
        near = [k for k in near if found.segment[k] == found.segment[j]]
        assert float(got[j]) == min(float(known[k]) for k in near)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sampled_from(["max", "mean"]), st.integers(0, 99))
def test_sentences_are_judged_by_all_of_their_words(rows, over, seed):
    found = words_of(*batch_of(rows))
    score = torch.rand(len(found), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leave = Sentence(0.4, over=over).step({"row": found.row}, Evidence(score), At(0, 0, 3))
    for r in found.row.unique().tolist():
        own = score[found.row == r]
        want = float(own.min() if over == "max" else own.mean())
        if abs(want - 0.4) > 1e-9:
            assert leave[found.row == r].tolist() == [want > 0.4] * len(own)


@dataclass(frozen=True)
class Scripted(WordPolicy):
    """Word j of row r halts at exit ``plan[r][j]``."""

    plan: tuple[tuple[int, ...], ...] = ()
    needs = frozenset({"label"})

    def start(self, rows, device=None, classes=None):
        return {"exit": torch.tensor([e for row in self.plan for e in row], dtype=torch.int64)}

    def check(self, low, high, measure, exits=None):
        pass

    def step(self, state, seen, at):
        return state["exit"] == at.exit


MODELS = {name: build(name, "ForTokenClassification") for name in ("bert", "modernbert")}
HEADS = {name: tagger_heads(model, spread=1.5) for name, model in MODELS.items()}


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.integers(2, 12), min_size=1, max_size=5),
    st.sampled_from(["all", "first"]),
    st.data(),
)
def test_any_pattern_of_halting(name, lengths, pieces, data):
    model, heads = MODELS[name], HEADS[name]
    words = random_words(lengths, data.draw(st.integers(0, 9)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 199, words.shape, generator=torch.Generator().manual_seed(0))
    counts = [len(Row(words[r, :n])) for r, n in enumerate(lengths)]
    plan = tuple(tuple(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))) for n in counts)
    measure = exeunt.confidence.measure("max_prob")
    recipe = Recipe(tuple(heads), measure, Scripted(0.5, pieces, plan=plan), Freeze(), heads)
    with torch.no_grad(), exeunt.attach(model, recipe) as early:
        got = model(input_ids=ids, attention_mask=mask, words=words).logits
    for r, n in enumerate(lengths):

        def decide(layer, row, logits, halted, plan=plan[r]):
            return [e == layer for e in plan], math.inf

        want, depth, _ = oracle(model, heads, ids[r, :n], words[r, :n], decide, pieces=pieces)
        assert torch.equal(early.depths[r, :n], depth)
        assert float((got[r, :n] - want).abs().max()) <= 2e-6
    assert early.report().exit_layers[0].tolist() == [e for row in plan for e in row]
    exited = [max(row, default=0) for row in plan]  # a row without a word ends at the first exit
    assert int(early.depths.max()) == max(exited)


def test_maps_of_tokenizers():
    texts = ["abc d", "d", ""]
    coded = TOKENIZER(texts, padding=True, return_tensors="pt")
    assert word_map(coded).tolist() == [[0, 1, 1, 1, 2, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    pair = TOKENIZER("d abc", "d d")
    assert word_map(pair).tolist() == [[0, 1, 2, 2, 2, 0, 3, 4, 0]]
    found = words_of(word_map(pair), None)
    assert found.segment.tolist() == [0, 0, 1, 1]
    split = TOKENIZER([["ab", "d"]], is_split_into_words=True)
    assert word_map(split).tolist() == [[0, 1, 1, 2, 0]]


def test_maps_that_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="word_map: expected what a fast tokenizer returned, .* got Slow"):
        word_map(Slow())
    with pytest.raises(ValueError, match="got dict without them"):
        word_map({"input_ids": [[1, 2]]})
    with pytest.raises(ValueError, match="call the tokenizer with padding=True"):
        word_map(TOKENIZER(["abc", "d"]))
    with pytest.raises(ValueError, match="words that cover the text, got some where attention_mask is 0"):
        words_of(torch.tensor([[1, 2]]), torch.tensor([[1, 0]]))


@pytest.mark.parametrize("window", [0, 4, -1, 2.0, True])
def test_windows_without_a_centre(window):
    with pytest.raises(ValueError, match="window must be odd, so that it has a centre, got"):
        tokee(window=window)


def test_rules_that_are_refused():
    with pytest.raises(ValueError, match="threshold must not be negative, got -0.1"):
        tokee(-0.1)
    with pytest.raises(ValueError, match="threshold must lie in -1..0 for neg_normalized_entropy"):
        sentee(1.5)
    with pytest.raises(ValueError, match="own must lie in 0..1 for max_prob, got 2"):
        tokee(0.9, own=2, doubt="max_prob")
    with pytest.raises(ValueError, match="one for each of 2 exits, got 3"):
        tokee((0.1, 0.2, 0.3), exits=[0, 1])
    with pytest.raises(ValueError, match="doubt must be 'entropy' or 'max_prob', got 'margin'"):
        sentee(doubt="margin")
    with pytest.raises(ValueError, match="over must be 'max' or 'mean', got 'sum'"):
        sentee(over="sum")
    with pytest.raises(ValueError, match="pieces must be 'all' or 'first', got 'last'"):
        tokee(pieces="last")
    with pytest.raises(ValueError, match="halted must be 'recomputed' or 'certain', got 'gone'"):
        tokee(halted="gone")
    with pytest.raises(ValueError, match="Freeze: norm must be 'post' or 'pre', got 'both'"):
        tokee(norm="both")
    with pytest.raises(ValueError, match=r"transitions must be a square bool tensor \[C, C\], got \[2, 3\]"):
        WordWindow(0.5, transitions=torch.ones(2, 3).bool())


def test_scores_that_are_not_finite_stay():
    state = {"segment": torch.zeros(3, dtype=torch.int64), "halted": torch.zeros(3, dtype=torch.bool)}
    for policy in (WordWindow(0.5, window=1), WordWindow(0.5, window=1, own=0.6)):
        got = policy.step(state, Evidence(torch.tensor([math.inf, math.nan, 0.9])), At(0, 0, 2))
        assert got.tolist() == [False, False, True]
