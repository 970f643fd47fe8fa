"""Exit heads of classifiers: as published, the same attached as in training, saved and read again."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="attach needs transformers")

import exeunt
from encoder_zoo import CLASSES, build, leaves_at, rows, states_of, thresholds
from exeunt.classifier_heads import (
    META,
    AttentionHead,
    ClassifierHeads,
    GlobalMaps,
    LinearHead,
    MetaProbe,
    PastFutureHead,
    PastMixHead,
    PoolerHead,
    View,
)
from exeunt.confidence import measure
from exeunt.heads import Probe
from exeunt.policies import Patience, Threshold
from exeunt.recipes import Recipe
from exeunt.states import Drop
from exeunt.training import adamw, fit

D, L = 32, 6
SHARED, MAPS = torch.nn.Linear(D, D), GlobalMaps(D, CLASSES, L)
EXITS = (0, 2, 3, 4)
KINDS = {
    "linear": lambda k, e: LinearHead(D, CLASSES, "mean"),
    "pooler": lambda k, e: PoolerHead(D, CLASSES),
    "narrow pooler": lambda k, e: PoolerHead(D, CLASSES, width=8),
    "shared pooler": lambda k, e: PoolerHead(D, CLASSES, pooler=SHARED),
    "attention": lambda k, e: AttentionHead(D, CLASSES, "mean", width=16),
    "past mix": lambda k, e: PastMixHead(D, CLASSES, layers=e + 1, earlier=k),
    "past and future": lambda k, e: PastFutureHead(D, CLASSES, layer=e, layers=L, maps=MAPS),
}


def heads_of(kind, seed=0):
    torch.manual_seed(seed)
    heads = ClassifierHeads({e: KINDS[kind](k, e) for k, e in enumerate(EXITS)})
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return heads


def plan(heads, values, confidence="max_prob"):
    return Recipe(tuple(heads), measure(confidence), Threshold(values), Drop(), heads)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_rows_get_the_logits_of_training(kind):
    model, heads = build("bert"), heads_of(kind)
    ids, mask, _ = rows(24, seed=3)
    states, full = states_of(model, ids, mask)
    with torch.no_grad():
        logits = torch.stack(list(heads.logits(states, mask).values()), 1)
    scores = logits.softmax(-1).amax(-1)
    values = thresholds(scores)
    depth = leaves_at(scores, values)
    want = torch.cat([logits, full.logits[:, None]], 1)[torch.arange(24), depth]
    assert len(depth.unique()) > 2
    with torch.no_grad(), exeunt.attach(model, plan(heads, values)) as early:
        got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(early.report().exit_layers[0], torch.tensor([*EXITS, L - 1])[depth])
    assert float((got - want).abs().max()) <= 4e-6


@pytest.mark.parametrize("kind", KINDS)
def test_heads_come_back_from_their_files(kind, tmp_path):
    model, heads = build("bert"), heads_of(kind)
    model.save_pretrained(tmp_path)
    before = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    heads.metadata = {"data": "none"}
    heads.save(tmp_path, model.config)
    assert {p.name for p in tmp_path.iterdir()} - set(before) == {"exeunt_heads.safetensors", "exeunt_heads.json"}
    again = ClassifierHeads.load(tmp_path, model.config)
    assert list(again) == list(heads) and again.metadata == heads.metadata
    for (name, a), (other, b) in zip(heads.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert len(list(again.parameters())) == len(list(heads.parameters())), "what was shared is shared"
    assert type(model).from_pretrained(tmp_path).config.num_labels == CLASSES


def test_heads_of_another_model_and_files_that_hold_none(tmp_path):
    heads = heads_of("linear")
    heads.save(tmp_path, build("bert").config)
    with pytest.raises(ValueError, match="exit heads of another model: expected vocab_size 199, got 77"):
        ClassifierHeads.load(tmp_path, build("bert", vocab_size=77).config)
    with pytest.raises(ValueError, match="holds no exit heads of a classifier"):
        ClassifierHeads.load(tmp_path / "nothing", build("bert").config)
    (tmp_path / "exeunt_heads.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(ValueError, match="holds no exit heads of a classifier"):
        ClassifierHeads.load(tmp_path, build("bert").config)
    with pytest.raises(ValueError, match=r"heads that agree on the number of labels, got \[2, 3\]"):
        ClassifierHeads({0: LinearHead(D, 2), 1: LinearHead(D, 3)})


def test_a_probe_with_a_hidden_layer_comes_back(tmp_path):
    heads = ClassifierHeads({1: LinearHead(D, CLASSES, probe=Probe(D, width=16))})
    heads.save(tmp_path, build("bert").config)
    again = ClassifierHeads.load(tmp_path, build("bert").config)
    assert again[1].probe.width == 16 and torch.equal(again[1].probe.hidden.weight, heads[1].probe.hidden.weight)


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    config = build("bert").config
    heads_of("linear").save(tmp_path, config)
    weights, about = (tmp_path / f"exeunt_heads.{kind}" for kind in ("safetensors", "json"))
    content, described = weights.read_bytes(), json.loads(about.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            ClassifierHeads.load(tmp_path, config)
        assert "\n" not in str(caught.value)

    for field in ("model", "heads", "shared", "metadata", "digest"):
        about.write_text(json.dumps({name: value for name, value in described.items() if name != field}))
        refused(rf"exeunt_heads\.json is damaged: expected the fields that save writes, got KeyError: '{field}'$")
    about.write_text(json.dumps({**described, "heads": {"0": described["heads"]["0"]}}))
    refused("is damaged: expected the fields that save writes, got RuntimeError: Error")
    about.write_text("[]")
    refused("holds no exit heads of a classifier")
    about.write_text(json.dumps(described))
    weights.write_bytes(content[:-40])
    refused("saved with its exeunt_heads.json, got another or a damaged one$")
    heads_of("linear", seed=1).save(tmp_path, config)
    about.write_text(json.dumps(described))  # the process was killed between the two files
    refused("saved with its exeunt_heads.json, got another or a damaged one$")
    weights.unlink()
    refused(r"expected the exeunt_heads\.safetensors that was saved with its exeunt_heads\.json, got none$")


def test_only_the_maps_above_an_exit_are_computed():
    maps = GlobalMaps(D, CLASSES, L)
    calls = []
    for j, layer in enumerate(maps.future):
        layer.register_forward_hook(lambda m, a, o, j=j: calls.append(j))
    head = PastFutureHead(D, CLASSES, layer=3, layers=L, maps=maps)
    head.judge(View(torch.randn(2, 5, D), None, 3, {}))
    assert calls == [4, 5]


def test_a_temperature_reaches_the_heads_after_it():
    heads, states = heads_of("past mix"), [torch.randn(4, 5, D) for _ in range(L)]
    with torch.no_grad():
        cold = heads.logits(states, None)
        heads[0].temperature.fill_(2.0)
        warm = heads.logits(states, None)
    assert torch.allclose(warm[0], cold[0] / 2) and not torch.allclose(warm[4], cold[4])


def test_a_mean_is_over_the_tokens_that_count():
    head = AttentionHead(D, CLASSES, "mean", width=16)
    hidden, mask = torch.randn(1, 9, D), torch.tensor([[1] * 5 + [0] * 4])
    assert torch.allclose(head(View(hidden, mask, 0, {})), head(View(hidden[:, :5], None, 0, {})), atol=1e-6)


def test_a_meta_probe_decides():
    model, heads = build("bert"), heads_of("narrow pooler")
    for e in EXITS:
        heads[e].meta = MetaProbe(CLASSES, 8, history=3)
    ids, mask, _ = rows(24, seed=3)
    states, _ = states_of(model, ids, mask)
    memory, columns = {}, []
    with torch.no_grad():
        for e in EXITS:
            view = View(states[e], mask, e, memory)
            columns.append(heads[e].meta(heads[e].meta.seen(view, heads[e].judge(view), (e + 1) / L)))
    scores = torch.stack(columns, 1)
    values = thresholds(scores)
    with torch.no_grad(), exeunt.attach(model, plan(heads, values, META)) as early:
        model(input_ids=ids, attention_mask=mask)
    depth = leaves_at(scores, values)
    assert torch.equal(early.report().exit_layers[0], torch.tensor([*EXITS, L - 1])[depth]) and len(depth.unique()) > 2
    assert memory["probabilities"].shape == (24, 4, CLASSES)


@pytest.mark.parametrize("confidence", ["saturation", "probe"])
def test_measures_of_the_pooled_state(confidence):
    model, heads = build("bert"), heads_of("linear")
    for e in EXITS:
        heads[e].probe = Probe(D)
        torch.nn.init.normal_(heads[e].probe.weight)
    ids, mask, _ = rows(20, seed=8)
    states, _ = states_of(model, ids, mask)
    pooled = [exeunt.classifier_heads.pooled(h, mask, "mean") for h in states]
    if confidence == "probe":
        scores = torch.stack([heads[e].probe(pooled[e]).detach() for e in EXITS], 1)
    else:
        first = model.bert.embeddings(input_ids=ids).detach()
        before = [exeunt.classifier_heads.pooled(first, mask, "mean"), *pooled]
        scores = torch.stack([torch.cosine_similarity(pooled[e], before[e]) for e in EXITS], 1)
    values = thresholds(scores)
    with torch.no_grad(), exeunt.attach(model, plan(heads, values, confidence)) as early:
        model(input_ids=ids, attention_mask=mask)
    depth = leaves_at(scores, values)
    assert torch.equal(early.report().exit_layers[0], torch.tensor([*EXITS, L - 1])[depth]) and len(depth.unique()) > 2


class Exits(torch.nn.Module):
    """What the fitting loop trains here: heads on a frozen encoder."""

    def __init__(self, model, heads):
        super().__init__()
        self.heads, self.model = heads, [model]

    def forward(self, batch):
        ids, mask, labels = batch
        states, _ = states_of(self.model[0], ids, mask)
        losses = [torch.nn.functional.cross_entropy(z, labels) for z in self.heads.logits(states, mask).values()]
        return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_trained_by_the_fitting_loop(kind, tmp_path):
    model, heads = build("bert"), heads_of(kind)
    ids, mask, _ = rows(16, longest=12, seed=9)
    labels = ids[:, 0] % CLASSES
    module = Exits(model, heads)
    before = float(module((ids, mask, labels)))
    optimizers = adamw(module, 0.01)
    fit(module, lambda step: (ids, mask, labels), tmp_path / "run", steps=25, warmup=3, optimizers=optimizers,
        identity={}, progress=False)  # fmt: skip
    assert float(module((ids, mask, labels))) < 0.8 * before


def test_patience_on_a_shared_pooler():
    """PABEE: rows leave when two exits in a row agree with the one before, each by itself."""
    model, heads = build("bert"), heads_of("shared pooler", seed=4)
    ids, mask, _ = rows(24, seed=3)
    states, _ = states_of(model, ids, mask)
    with torch.no_grad():
        labels = torch.stack([z.argmax(-1) for z in heads.logits(states, mask).values()], 1)
    with torch.no_grad(), exeunt.attach(model, Recipe(EXITS, None, Patience(2), Drop(), heads)) as early:
        model(input_ids=ids, attention_mask=mask)
    for row, found in zip(labels.tolist(), early.report().exit_layers[0].tolist(), strict=True):
        agreed, want = 0, L - 1
        for k in range(1, len(row)):
            agreed = agreed + 1 if row[k] == row[k - 1] else 0
            if agreed == 2:
                want = EXITS[k]
                break
        assert found == want
