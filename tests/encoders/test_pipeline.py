"""The pipeline returns what transformers' own does; a cascade answers as its models would one after another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tokenizers
import torch

transformers = pytest.importorskip("transformers", reason="the pipeline is transformers' own")

import exeunt
from encoder_zoo import CLASSES, build, rows
from exeunt.cascade import Cascade, difficulty_inversion_score
from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.confidence import measure
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.states import Drop

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(190))]
WORD_LEVEL = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, "[UNK]"))
WORD_LEVEL.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
WORD_LEVEL.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
TOKENIZER = transformers.PreTrainedTokenizerFast(  # a class that old and new transformers build alike
    tokenizer_object=WORD_LEVEL, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    model_max_length=80,
)  # fmt: skip


def texts(count, seed=0):
    ids, _, lengths = rows(count, seed=seed)
    return [" ".join(f"w{int(i) % 190}" for i in row[:n]) for row, n in zip(ids, lengths, strict=True)]


def plan(value):
    torch.manual_seed(2)
    heads = ClassifierHeads({e: LinearHead(32, CLASSES) for e in range(5)})
    return Recipe(tuple(heads), measure("max_prob"), Threshold(value), Drop(), heads)


@pytest.mark.parametrize("settings", [{}, {"top_k": None}, {"top_k": 2}, {"function_to_apply": "none"}])
def test_results_are_those_of_transformers(settings):
    some = texts(7)
    stock = transformers.pipeline("text-classification", build("bert"), tokenizer=TOKENIZER, batch_size=4)
    early = exeunt.pipeline("text-classification", build("bert"), plan(math.inf), tokenizer=TOKENIZER, batch_size=4)
    for inputs in (some, some[0], {"text": some[0], "text_pair": some[1]}):
        assert early(inputs, **settings) == stock(inputs, **settings)
    assert early([]) == []


def test_order_and_progress_and_streams():
    some = texts(230, seed=1)
    early = exeunt.pipeline("text-classification", build("bert"), plan(0.45), tokenizer=TOKENIZER, batch_size=16)
    found = early(some)
    left = torch.cat(early.report().exit_layers)
    assert len(left.unique()) > 1 and len(left) == 230
    early.exits.reset_report()
    read = []

    def stream():
        for text in some:
            read.append(text)
            yield text

    first = next(iter(early(stream())))
    assert first["label"] == found[0]["label"] and len(read) < 230, "results come while inputs are read"
    for text, one in list(zip(some, found, strict=True))[::40]:
        alone = early(text)[0]
        assert alone["label"] == one["label"] and abs(alone["score"] - one["score"]) < 2e-6


def test_a_text_that_is_too_long_is_truncated_and_detach_goes_back():
    early = exeunt.pipeline("sentiment-analysis", build("bert"), plan(0.0), tokenizer=TOKENIZER)
    assert len(early([" ".join(["w1"] * 500)])) == 1 and early.report().layers_per_row == 1
    early.detach()
    stock = transformers.pipeline("text-classification", build("bert"), tokenizer=TOKENIZER)
    assert early("w1 w2") == stock("w1 w2")


def test_a_pipeline_refuses():
    with pytest.raises(ValueError, match="task must be text-classification, .* or ner, got 'summarization'"):
        exeunt.pipeline("summarization", build("bert"), plan(0.5))
    with pytest.raises(ValueError, match="expected a transformers model or its checkpoint, got a Linear"):
        exeunt.pipeline("text-classification", torch.nn.Linear(2, 2), plan(0.5))


def sharp(layers, seed):
    return build("bert", num_hidden_layers=layers, seed=seed)


def test_a_cascade_answers_as_its_models_one_after_another():
    models = [sharp(2, 0), sharp(4, 1), sharp(6, 2)]
    ids, mask, lengths = rows(20, seed=4)
    with torch.no_grad():
        alone = torch.stack([m(input_ids=ids, attention_mask=mask).logits for m in models], 1)
        scores = alone.softmax(-1).amax(-1)
        limits = tuple(float(scores[:, k].sort().values[9:11].mean()) for k in range(2))
        cascade = Cascade(models, limits)
        seen = [[], [], []]
        for k, m in enumerate(models):
            m.register_forward_pre_hook(
                lambda _, args, kwargs, k=k: seen[k].append(kwargs["input_ids"].shape), with_kwargs=True
            )
        out = cascade(input_ids=ids, attention_mask=mask)
    answered = torch.where(scores[:, 0] >= limits[0], 0, torch.where(scores[:, 1] >= limits[1], 1, 2))
    assert len(answered.unique()) == 3
    want = alone[torch.arange(20), answered]
    assert float((out.logits - want).abs().max()) <= 2e-6
    counts = tuple(int((answered >= k).sum()) for k in range(3))
    assert cascade.report().rows == counts and [s[0][0] for s in seen] == list(counts)
    assert cascade.report().layers_per_row == pytest.approx(
        sum(n * d for n, d in zip(counts, (2, 4, 6), strict=True)) / 20
    )
    assert seen[1][0][1] == int(lengths[answered >= 1].max())


def test_what_one_row_says_for_all_is_cut_with_the_ids():
    models = [sharp(2, 0), sharp(4, 1)]
    ids, mask, lengths = rows(12, seed=5)
    places = torch.arange(40).flip(0)[None]
    with torch.no_grad():
        first, second = (m(input_ids=ids, attention_mask=mask, position_ids=places).logits for m in models)
        scores = first.softmax(-1).amax(-1)
        sure = scores >= scores[lengths.argmax()]  # the longest row goes no further, so what goes on is cut
        cascade = Cascade(models, float(scores[lengths.argmax()]))
        got = cascade(input_ids=ids, attention_mask=mask, position_ids=places).logits
    assert 0 < int(sure.sum()) < 12 and int(lengths[~sure].max()) < 40
    assert float((got - torch.where(sure[:, None], first, second)).abs().max()) <= 2e-6


def test_a_cascade_refuses():
    small, large = sharp(2, 0), sharp(4, 1)
    with pytest.raises(ValueError, match="expected two models or more, got 1"):
        Cascade([small], 0.5)
    with pytest.raises(ValueError, match="expected models of the same num_labels, got 3, 2"):
        Cascade([small, build("bert", num_labels=2)], 0.5)
    with pytest.raises(ValueError, match="expected 1 thresholds, got 2"):
        Cascade([small, large], [0.5, 0.6])
    with pytest.raises(ValueError, match="a measure of one model's logits, got saturation"):
        Cascade([small, large], 0.5, "saturation")
    with pytest.raises(ValueError, match="at least one row, got an empty batch"):
        Cascade([small, large], 0.5)(torch.ones(0, 4, dtype=torch.int64))


def test_difficulty_inversion_score_counts_pairs():
    g = torch.Generator().manual_seed(0)
    confidence, difficulty = torch.rand(60, generator=g), torch.randint(0, 3, (60,), generator=g)
    right = pairs = 0
    for a in range(60):
        for b in range(60):
            if difficulty[a] < difficulty[b]:
                pairs += 1
                right += bool(confidence[a] > confidence[b])
    assert difficulty_inversion_score(confidence, difficulty) == right / pairs
    with pytest.raises(ValueError, match="rows of different difficulty"):
        difficulty_inversion_score(confidence, torch.zeros(60))


def test_the_example_in_the_readme(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("<!-- encoder example -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    model = build("bert")
    for saved in (model, TOKENIZER):
        saved.save_pretrained("my-classifier")
    ClassifierHeads({e: LinearHead(32, CLASSES) for e in range(5)}).save("my-classifier", model.config)
    loaded = type(model).from_pretrained("my-classifier").eval()
    exec(compile(code, "README.md", "exec"), {"model": loaded, "texts": texts(3)})
    said = capsys.readouterr().out
    assert said.count("'label'") == 3 and "3 rows in 1 forwards, 6 layers" in said
