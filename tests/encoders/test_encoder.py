"""attach on encoders: bit-identical when nothing leaves; rows that leave equal themselves alone, and the oracle.

The oracle runs every layer for every row of the unattached model and looks afterwards where each row would have left.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="attach needs transformers")

import exeunt
from encoder_zoo import CLASSES, ZOO, build, leaves_at, rows, states_of, thresholds
from exeunt.classifier_heads import ClassifierHeads, LinearHead, PoolerHead
from exeunt.confidence import measure
from exeunt.policies import Patience, Threshold
from exeunt.recipes import Recipe
from exeunt.states import Drop

NEVER = math.inf
CLOSE = 2e-6
CLEAR = 1e-4  # scores nearer than this to their threshold may be decided otherwise in another batch


def heads_for(model, kind=LinearHead, pooling="first", classes=CLASSES, seed=3, spread=1.5):
    config = exeunt.models.encoder_in(model).config
    torch.manual_seed(seed)
    heads = {}
    for e in range(config.num_hidden_layers - 1):
        heads[e] = kind(config.hidden_size, classes, pooling)
        with torch.no_grad():
            heads[e].out.weight.normal_(std=spread / config.hidden_size**0.5)
    return ClassifierHeads(heads)


def recipe(heads, value=0.5, name="max_prob", exits=None):
    return Recipe(tuple(heads) if exits is None else exits, measure(name), Threshold(value), Drop(), heads)


@torch.no_grad()
def exit_logits(model, heads, ids, mask):
    """Logits [B, exits, C] of every exit, row by row and in float32, and the model's own output at full depth."""
    states, out = states_of(model, ids, mask)
    logits = torch.empty(len(ids), len(heads), heads.classes)
    for row in range(len(ids)):
        for k, e in enumerate(heads):
            h = states[e][row]
            h = h[0] if heads[e].pooling == "first" else h[mask[row].bool()].mean(0)
            if isinstance(heads[e], PoolerHead):
                h = torch.tanh(heads[e].pooler(h))
            logits[row, k] = heads[e].out(h)
    return logits, out


@pytest.mark.parametrize("name", ZOO)
def test_nothing_leaves_nothing_changes(name):
    model = build(name)
    ids, mask, _ = rows(5)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0, 1]))
    with torch.no_grad():
        want = model(**inputs)
        with exeunt.attach(model, recipe(heads_for(model), NEVER)) as early:
            got = model(**inputs)
            bare = model(input_ids=ids)
        after = model(**inputs)
        assert torch.equal(bare.logits, model(input_ids=ids).logits)
    assert type(got) is type(want) and torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits) and torch.equal(after.logits, want.logits)
    depth = len(early.structure.layers)
    assert early.report().histogram == {depth - 1: 10} and early.report().layer_rows == 10 * depth


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("name", ZOO)
def test_rows_equal_the_oracle_and_themselves_alone(name, batch):
    model = build(name)
    heads = heads_for(model, PoolerHead if batch == 7 else LinearHead, "mean" if batch == 7 else "first")
    ids, mask, lengths = rows(64, seed=1)
    logits, full = exit_logits(model, heads, ids, mask)
    scores = logits.softmax(-1).amax(-1)
    values = thresholds(scores)
    chosen = torch.arange(64)[:batch] if batch > 1 else leaves_at(scores, values).eq(2).nonzero()[0]
    ids, mask, lengths, scores, logits = (t[chosen] for t in (ids, mask, lengths, scores, logits))
    depth = leaves_at(scores, values)
    want = torch.cat([logits, full.logits[chosen, None]], 1)[torch.arange(batch), depth]
    assert batch == 1 or len(depth.unique()) > 2, "the case has to let rows leave at several depths"
    assert float((scores - torch.tensor(values)).abs().min()) > CLEAR
    with torch.no_grad(), exeunt.attach(model, recipe(heads, values)) as early:
        got = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(early.report().exit_layers[-1], depth)
        assert early.report().layer_rows == int((depth + 1).sum())
        assert float((got - want).abs().max()) <= CLOSE
        for row in range(0, batch, 5):
            alone = model(input_ids=ids[row : row + 1, : lengths[row]]).logits[0]
            assert int(early.report().exit_layers[-1]) == int(depth[row])
            assert float((alone - got[row]).abs().max()) <= CLOSE


class RowsRun:
    """Rows and tokens that reach each feed-forward of the layers, counted without exeunt."""

    def __init__(self, model):
        self.rows = self.tokens = 0
        modules = exeunt.models.encoder_in(model).named_modules()
        dense = [m for path, m in modules if isinstance(m, torch.nn.Linear) and "qkv" not in path]
        inner = [m for m in dense if m.out_features in (48, 96) and m.in_features == 32]
        self.handles = [m.register_forward_pre_hook(self.note) for m in inner]

    def note(self, module, args):
        self.rows += args[0].shape[0]
        self.tokens += args[0].shape[0] * args[0].shape[1]

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", ZOO)
def test_rows_that_left_cost_nothing(name):
    model = build(name)
    ids, mask, _ = rows(16, seed=2)
    heads = heads_for(model)
    values = thresholds(exit_logits(model, heads, ids, mask)[0].softmax(-1).amax(-1))
    with torch.no_grad(), exeunt.attach(model, recipe(heads, values)) as early:
        counter = RowsRun(model)
        model(input_ids=ids, attention_mask=mask)
        counter.remove()
    report = early.report()
    assert (counter.rows, counter.tokens) == (report.layer_rows, report.layer_tokens)
    assert report.layer_rows < 16 * len(early.structure.layers)
    assert report.layer_tokens < report.layer_rows * ids.shape[1], "padding of rows that go on is cut"


def test_everyone_leaves_at_once_and_the_rest_returns():
    model = build("bert")
    ids, mask, _ = rows(4)
    with torch.no_grad(), exeunt.attach(model, recipe(heads_for(model), 0.0, exits=(1,))) as early:
        counter = RowsRun(model)
        out = model(input_ids=ids, attention_mask=mask)
        counter.remove()
    assert counter.rows == 8 and early.report().histogram == {1: 4} and out.logits.shape == (4, CLASSES)


@pytest.mark.parametrize("buckets", [True, False])
def test_a_bare_encoder_hands_back_the_state_of_the_exit(buckets):
    model = build("bert", "Model")
    heads = heads_for(model)
    ids, mask, lengths = rows(12, seed=4)
    states, full = states_of(model, ids, mask)
    values = thresholds(exit_logits(model, heads, ids, mask)[0].softmax(-1).amax(-1))
    with torch.no_grad():
        early = exeunt.attach(model, recipe(heads, values), buckets=buckets)
        out = model(input_ids=ids, attention_mask=mask)
        early.detach()
    depth = early.report().exit_layers[0]
    assert type(out) is type(full) and len(depth.unique()) > 2
    every = [*states, full.last_hidden_state]
    for row, d in enumerate(depth.tolist()):
        n = lengths[row]
        assert float((out.last_hidden_state[row, :n] - every[d][row, :n]).abs().max()) <= CLOSE


class MeanClassifier(torch.nn.Module):
    """A user's own module around a sentence encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = build("mpnet", "Model")
        self.head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, CLASSES))

    def forward(self, input_ids, attention_mask):
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        return self.head((h * mask).sum(1) / mask.sum(1))


def test_a_users_head_on_a_sentence_encoder():
    model = MeanClassifier().eval()
    heads = heads_for(model, pooling="mean")
    ids, mask, _ = rows(9, seed=5)
    values = thresholds(exit_logits(model, heads, ids, mask)[0].softmax(-1).amax(-1), 0.2)
    with torch.no_grad():
        full = model(ids, mask)
        with exeunt.attach(model, recipe(heads, NEVER)):
            assert torch.equal(model(ids, mask), full)
        with exeunt.attach(model, recipe(heads, values)) as early:
            got = model(ids, mask)
    depth = early.report().exit_layers[0]
    stayed = depth == 5
    assert 0 < int(stayed.sum()) < 9
    assert float((got - full)[stayed].abs().max()) <= CLOSE and float((got - full)[~stayed].abs().min()) > CLOSE


class Pairs(MeanClassifier):
    """Two texts a row: exits would not know which of them a decision is about."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) - super().forward(input_ids.flip(1), attention_mask)


class Layered(MeanClassifier):
    """Logits that no module returns."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) * 2 + 1


def test_modules_of_another_build_are_refused():
    with pytest.raises(ValueError, match="expected Pairs to call its encoder once in a forward, got 2 calls"):
        exeunt.attach(Pairs(), recipe(heads_for(build("mpnet"), pooling="mean")))
    with pytest.raises(ValueError, match="logits of Layered to be what one of its modules returns"):
        exeunt.attach(Layered(), recipe(heads_for(build("mpnet"), pooling="mean")))


def test_half_precision():
    model = build("bert").bfloat16()
    heads = heads_for(model).bfloat16()
    ids, mask, _ = rows(9)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=mask).logits
        with exeunt.attach(model, recipe(heads, NEVER)):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, full)
        with exeunt.attach(model, recipe(heads, 0.5)) as early:
            got = model(input_ids=ids, attention_mask=mask).logits
    assert got.dtype == torch.bfloat16 and 0 < early.report().layer_rows < 54
    stayed = early.report().exit_layers[0] == 5
    assert torch.allclose(got[stayed], full[stayed], atol=0.05)


def test_regression_with_patience():
    model = build("roberta", num_labels=1)
    heads = heads_for(model, classes=1, spread=0.3)
    ids, mask, lengths = rows(10, seed=6)
    plan = Recipe(tuple(heads), None, Patience(1, tolerance=0.2), Drop(), heads)
    with torch.no_grad(), exeunt.attach(model, plan) as early:
        together = model(input_ids=ids, attention_mask=mask).logits
        depth = early.report().exit_layers[0]
        assert len(depth.unique()) > 1
        for row in range(10):
            alone = model(input_ids=ids[row : row + 1, : lengths[row]]).logits
            assert float((alone[0] - together[row]).abs().max()) <= CLOSE
            assert int(early.report().exit_layers[-1]) == int(depth[row])


def test_copies_and_training_run_as_if_nothing_were_attached():
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids, mask, _ = rows(4)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=mask).logits
        with exeunt.attach(model, recipe(heads_for(model), 0.0)) as early:
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(input_ids=ids, attention_mask=mask).logits, full)
            model.train()
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, full)
            model.eval()
            assert early.report().forwards == 0
            assert not torch.equal(model(input_ids=ids, attention_mask=mask).logits, full)


@pytest.mark.parametrize("name", ZOO)
def test_exits_on_a_copy_are_exits_on_the_model(name):
    model = build(name)
    ids, mask, _ = rows(9)
    heads = heads_for(model)
    plan = recipe(heads, thresholds(exit_logits(model, heads, ids, mask)[0].softmax(-1).amax(-1)))
    with torch.no_grad(), exeunt.attach(model, plan) as early:
        want, twin = model(input_ids=ids, attention_mask=mask).logits, copy.deepcopy(model)
    with torch.no_grad(), exeunt.attach(twin, plan) as again:
        got = twin(input_ids=ids, attention_mask=mask).logits
    assert early.report().exit_layers[0].unique().numel() > 1 and torch.equal(got, want)
    assert torch.equal(again.report().exit_layers[0], early.report().exit_layers[0])


def test_exits_on_a_part_are_exits_on_the_model():
    model = build("bert")
    stock = {name: dict(vars(m)) for name, m in model.named_modules()}
    for first, second in ((model, model.bert), (model.bert, model)):
        sentence = f"a model without exits, got a {type(second).__name__} that has them"
        with exeunt.attach(first, recipe(heads_for(model))), pytest.raises(ValueError, match=sentence):
            exeunt.attach(second, recipe(heads_for(model)))
    assert stock == {name: vars(m) for name, m in model.named_modules()}
    exeunt.attach(model, recipe(heads_for(model))).detach()


SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4)
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4)
OTHERS = {
    "T5EncoderModel": ("T5Config", T5, "hand on their states alone, got position_bias of layer 1 from an earlier one"),
    "T5ForSequenceClassification": ("T5Config", T5, "an encoder alone, got an encoder and a decoder"),
    "XLNetForSequenceClassification": (
        "XLNetConfig", dict(vocab_size=99, d_model=32, d_inner=48, n_layer=5, n_head=4),
        r"layers that take \[2, 5, D\], got \[5, 2, 32\]",
    ),
    "LongformerForSequenceClassification": (
        "LongformerConfig", {**SMALL, "attention_window": 4}, r"layers that take \[2, 5, D\], got \[2, 8, 32\]",
    ),
    "LlamaModel": ("LlamaConfig", SMALL, "layers without a cache, got (cache|past_key_values?) of layer 0"),
    "FNetForSequenceClassification": (
        "FNetConfig", SMALL,
        "(give a row the same without other rows and without its padding.* FNetLayer|TypeError: .*attention_mask')",
    ),
    "ConvBertForSequenceClassification": (
        "ConvBertConfig", {**SMALL, "embedding_size": 32}, "without its padding, got another output in ConvBertLayer"
    ),
    "BertForMultipleChoice": ("BertConfig", SMALL, "a model of texts, .* got RuntimeError: shape"),
    "NystromformerForSequenceClassification": (
        "NystromformerConfig", {**SMALL, "segment_means_seq_len": 64, "num_landmarks": 8},
        "a model of texts, .* got RuntimeError: shape",
    ),
    "CanineForSequenceClassification": (
        "CanineConfig", {k: v for k, v in SMALL.items() if k != "vocab_size"},
        "a model of texts, .* got AttributeError: 'CanineConfig'",
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {**SMALL, "conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 2},
        "a model of texts, .* got TypeError: .*(input_values|input_ids)'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_exits_cannot_serve_are_refused(name):
    kind, settings, sentence = OTHERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    heads = ClassifierHeads({1: LinearHead(32, 2)})
    with pytest.raises(ValueError, match=f"^attach: expected .*{sentence}.* {name}"):
        exeunt.attach(model, recipe(heads))
    assert all("forward" not in vars(m) for m in model.modules())


def test_bad_input_gets_one_sentence():
    model, ids = build("bert"), torch.ones(2, 5, dtype=torch.int64)
    heads = heads_for(model)

    def refused(words, heads=heads, model=model, **kw):
        with pytest.raises(ValueError, match=words):
            exeunt.attach(model, recipe(heads, **kw))

    refused("expected exit heads of 3 labels like the model, got 2", heads_for(model, classes=2))
    wide = ClassifierHeads({1: LinearHead(64, CLASSES)})
    refused("expected exit heads of width 32, got 64 at exit 1", wide)
    refused(r"exits must lie in 0\.\.4 for 6 layers, got \[5\]", ClassifierHeads({5: LinearHead(32, CLASSES)}))
    refused(r"expected an exit head at every exit, got none at \[4\]", ClassifierHeads({1: wide[1]}), exits=(1, 4))
    refused("exit heads must be torch.float32 on cpu like the model, got torch.bfloat16", heads_for(model).bfloat16())
    with pytest.raises(ValueError, match="expected a recipe with ClassifierHeads for an encoder, got none"):
        exeunt.attach(model, Recipe((1,), measure("saturation"), Threshold(0.5), Drop()))
    flex = build("bert")
    flex.config._attn_implementation = "flex_attention"
    refused("expected an encoder with eager or sdpa attention, .* got flex_attention", model=flex)
    refused("max_prob needs two labels or more, got a regression", heads_for(model, classes=1),
            model=build("bert", num_labels=1))  # fmt: skip
    with exeunt.attach(model, recipe(heads)):
        refused("expected a model without exits")
        with pytest.raises(ValueError, match="expected at least one row, got an empty batch"):
            model(input_ids=ids[:0])
        with pytest.raises(ValueError, match="expected at most 80 tokens a row, got 90: truncate the text"):
            model(input_ids=torch.ones(1, 90, dtype=torch.int64))
        with pytest.raises(ValueError, match="without output_hidden_states"):
            model(input_ids=ids, output_hidden_states=True)
    model(input_ids=ids, output_hidden_states=True)
