"""The pipeline for taggers returns what transformers' own does, and colours the text by where its words halted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the pipeline is transformers' own")

import exeunt
from encoder_zoo import build
from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.policies import Threshold
from exeunt.recipes import Recipe, sentee, tokee
from exeunt.states import Drop
from exeunt.words import word_map
from word_oracle import tagger_heads, word_pieces

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}
TEXTS = ["ab c", "defg h ab", "a", "c c c c ba ba"]


def tokenizer(longest=80):
    return word_pieces(PIECES, longest)


def model():
    return build("bert", "ForTokenClassification", id2label=LABELS, label2id={v: k for k, v in LABELS.items()})


def pair(recipe, **settings):
    stock = transformers.pipeline("token-classification", model(), tokenizer=tokenizer(), batch_size=3, **settings)
    return stock, exeunt.pipeline(
        "token-classification", model(), recipe, tokenizer=tokenizer(), batch_size=3, **settings
    )


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_results_are_those_of_transformers(strategy):
    stock, early = pair(tokee(0.0, heads=tagger_heads(model())), aggregation_strategy=strategy, ignore_labels=[])
    assert early(TEXTS) == stock(TEXTS) and early(TEXTS[0]) == stock(TEXTS[0]) and early([]) == []
    assert early(TEXTS, ignore_labels=["O"]) == stock(TEXTS, ignore_labels=["O"])
    assert list(early(iter(TEXTS))) == list(stock(text for text in TEXTS))
    assert early.report().words == 3 * sum(len(text.split()) for text in TEXTS) + len(TEXTS[0].split())


@pytest.mark.parametrize("recipe", [tokee, sentee])
def test_words_that_halt_answer_with_their_exit(recipe):
    heads = tagger_heads(model())
    _, early = pair(recipe(0.9, heads=heads), ignore_labels=[])
    found = early(TEXTS)
    assert min(early.report().histogram) < 5
    tagger, coded = model(), tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), exeunt.attach(tagger, recipe(0.9, heads=heads)):
        p = tagger(**coded, words=word_map(coded)).logits.softmax(-1)
    for r, entities in enumerate(found):
        for entity in entities:
            best = p[r, entity["index"]]
            assert entity["entity"] == LABELS[int(best.argmax())]
            assert abs(entity["score"] - float(best.max())) < 2e-6


def test_split_words_and_strides():
    stock, early = pair(tokee(0.0, heads=tagger_heads(model())), ignore_labels=[])
    assert early([["ab", "c"]], is_split_into_words=True) == stock([["ab", "c"]], is_split_into_words=True)
    settings = dict(tokenizer=tokenizer(8), aggregation_strategy="simple", stride=2, ignore_labels=[])
    stock = transformers.pipeline("ner", model(), **settings)
    early = exeunt.pipeline("ner", model(), tokee(0.0, heads=tagger_heads(model())), **settings)
    text = " ".join(TEXTS)
    assert early(text) == stock(text)


def test_the_page_has_every_word_on_its_colour():
    heads = tagger_heads(model())
    _, early = pair(tokee(0.9, heads=heads, window=1))
    page = early.html(TEXTS, "Words")
    assert "Words" in page and "of 6 layers" in page and all(c in page for c in ("ab", "ef"))
    depths = early.exits.depths
    shown = {int(d) + 1 for d in depths.flatten().tolist() if d >= 0}
    for depth in shown - {6}:
        assert exeunt.picture.colour(depth, 6) in page or f"left after {depth} of" not in page
    assert early.html("ab c").count("<!DOCTYPE html>") == 1


def test_what_is_refused():
    heads = tagger_heads(model())
    rows = Recipe((0,), exeunt.confidence.measure("max_prob"), Threshold(0.5), Drop(), heads)
    with pytest.raises(ValueError, match="token-classification expects a recipe over words, .* got one with Threshold"):
        exeunt.pipeline("token-classification", model(), rows, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="task must be .* got 'summarization'"):
        exeunt.pipeline("summarization", model(), rows, tokenizer=tokenizer())

    class Slow(type(tokenizer())):
        is_fast = False

    slow = tokenizer()
    slow.__class__ = Slow
    with pytest.raises(ValueError, match="token-classification expects a fast tokenizer, .* got Slow"):
        exeunt.pipeline("token-classification", model(), tokee(heads=heads), tokenizer=slow)
    with pytest.raises(ValueError, match="exit heads of 3 labels like the model, got 2"):
        exeunt.pipeline("ner", model(), tokee(heads=ClassifierHeads({0: LinearHead(32, 2)})), tokenizer=tokenizer())


def test_the_example_in_the_readme(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("<!-- tagger example -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    tagger = model()
    for saved in (tagger, tokenizer()):
        saved.save_pretrained("my-tagger")
    tagger_heads(tagger).save("my-tagger", tagger.config)
    loaded = type(tagger).from_pretrained("my-tagger").eval()
    exec(compile(code, "README.md", "exec"), {"model": loaded, "texts": TEXTS})
    assert "12 words of 4 rows" in capsys.readouterr().out
    assert "of 6 layers" in Path("tagged.html").read_text()
