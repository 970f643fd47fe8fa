"""attach on taggers: bit-identical while no word halts; words that halt equal the oracle, which runs everything."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="attach needs transformers")

import exeunt
from encoder_zoo import CLASSES, build, rows
from exeunt.classifier_heads import AttentionHead, ClassifierHeads, LinearHead, PoolerHead
from exeunt.confidence import measure
from exeunt.policies import WordWindow
from exeunt.recipes import Recipe, deebert, sentee, tokee
from exeunt.states import Freeze
from word_oracle import oracle, random_words, sentence_rule, tagger_heads, window_rule

NAMES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert")
CLOSE, CLEAR = 2e-6, 1e-4
BOUND = 0.86  # of the normalised entropy of random heads: about half of the words halt on the way
BATCHES = (1, 8, 64)


def tagger(name, **settings):
    model = build(name, "ForTokenClassification", **settings)
    heads = tagger_heads(model, spread=1.5)
    # DeBERTa has a convolution behind its first layer, where the state before the norm is not what goes on.
    return model, ClassifierHeads({e: heads[e] for e in heads if e or name != "deberta-v2"})


class FeedForward:
    """Token-rows that reach the feed-forwards of the layers, counted without exeunt."""

    def __init__(self, model):
        self.count, inner = 0, []
        for path, m in exeunt.models.encoder_in(model).named_modules():
            if path.endswith(("intermediate.dense", "ffn.lin1", "mlp.Wi")):
                inner.append(m)
        assert len(inner) == 6
        self.handles = [m.register_forward_pre_hook(self.note) for m in inner]

    def note(self, module, args):
        self.count += args[0].shape[:-1].numel()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


def judged(model, heads, count, rule, longest=26, **settings):
    """Rows whose scores are clear of their thresholds, and what the oracle says of them."""
    ids, _, lengths = rows(count + count // 2, longest=longest, seed=1)
    words = random_words(lengths, 1, longest)
    kept = []
    for r, n in enumerate(lengths.tolist()):
        if len(kept) == count:
            break
        logits, depth, clear = oracle(model, heads, ids[r, :n], words[r, :n], rule, **settings)
        if clear > CLEAR:
            kept.append((r, logits, depth))
    assert len(kept) >= count, "too few rows are clear of the thresholds"
    return ids, words, lengths, kept


def same(model, recipe, ids, words, lengths, kept, batches=BATCHES, close=CLOSE):
    """Batches of these rows give what the oracle said of each, and run no more than that takes."""
    seen = set()
    for size in batches:
        part = kept[:size]
        at = torch.tensor([r for r, _, _ in part])
        width = int(lengths[at].max())
        mask = (torch.arange(width) < lengths[at][:, None]).long()
        with torch.no_grad(), exeunt.attach(model, recipe) as early, FeedForward(model) as ran:
            got = model(input_ids=ids[at, :width], attention_mask=mask, words=words[at, :width]).logits
            depths = early.depths
        for k, (r, logits, depth) in enumerate(part):
            n = int(lengths[r])
            assert torch.equal(depths[k, :n], depth), (size, r)
            assert float((got[k, :n] - logits).abs().max()) <= close, (size, r)
            assert bool((depths[k, n:] == -1).all())
            seen.update(depth.tolist())
        first = min(int(d.min()) for _, _, d in part)  # up to here the stock layers ran, padding and all
        want = len(part) * width * (first + 1) + sum(int((d - first).sum()) for _, _, d in part)
        report = early.report()
        assert ran.count == report.layer_tokens == want
        assert report.words == sum(report.histogram.values()) and report.tokens == int(mask.sum())
    return seen


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", NAMES)
def test_words_equal_the_oracle(name, norm):
    model, heads = tagger(name)
    frozen = "post" if name == "modernbert" else norm  # it normalises first: the oracle has no norm to apply
    rule = window_rule(dict.fromkeys(heads, -BOUND), 3)
    found = judged(model, heads, 64, rule, norm=frozen)
    recipe = tokee(BOUND, window=3, norm=norm, heads=heads)
    assert len(same(model, recipe, *found)) >= 4, "the case has to let words halt at several depths"


@pytest.mark.parametrize("kind", [LinearHead, PoolerHead])
@pytest.mark.parametrize(
    ("settings", "rule", "options"),
    [
        (dict(window=1), dict(size=1), {}),
        (dict(window=7, pieces="first"), dict(size=7), dict(pieces="first")),
        (dict(window=5, own=0.7), dict(size=5, own=-0.7), {}),
        (dict(window=5, halted="certain"), dict(size=5, settled=True), {}),
        (dict(window=3, doubt="max_prob", threshold=0.55), dict(size=3, name="max_prob"), {}),
        (dict(window=3, norm="pre", pieces="first"), dict(size=3), dict(norm="pre", pieces="first")),
        (dict(threshold=(0.8, 0.9, 0.7, 0.9, 0.8)), dict(size=5), {}),
    ],
)
def test_variants_of_the_window(settings, rule, options, kind):
    model, _ = tagger("bert")
    heads = tagger_heads(model, kind, spread=2.0 if kind is PoolerHead else 1.5)
    threshold = settings.pop("threshold", BOUND)
    each = threshold if isinstance(threshold, tuple) else (threshold,) * 5
    sign = 1 if settings.get("doubt") == "max_prob" else -1
    decide = window_rule({e: sign * v for e, v in zip(heads, each, strict=True)}, **rule)
    same(model, tokee(threshold, heads=heads, **settings), *judged(model, heads, 8, decide, **options), (8,))


@pytest.mark.parametrize("over", ["max", "mean"])
def test_sentences_leave_whole(over):
    model, heads = tagger("bert")
    bound = 0.93 if over == "max" else 0.8
    found = judged(model, heads, 64, sentence_rule(dict.fromkeys(heads, -bound), over), longest=14)
    assert len(same(model, sentee(bound, over=over, heads=heads), *found)) >= 3


def test_labels_that_halted_neighbours_rule_out():
    model, heads = tagger("bert")
    transitions = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    rule = window_rule(dict.fromkeys(heads, -BOUND), 1)
    found = judged(model, heads, 8, rule, transitions=transitions)
    free = judged(model, heads, 8, rule)
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(found[3], free[3], strict=False))
    ids, words, lengths, kept = found
    at = torch.tensor([r for r, _, _ in kept[:8]])
    mask = (torch.arange(ids.shape[1]) < lengths[at][:, None]).long()
    with torch.no_grad(), exeunt.attach(model, tokee(BOUND, window=1, transitions=transitions, heads=heads)) as early:
        got = model(input_ids=ids[at], attention_mask=mask, words=words[at]).logits
    for k, (r, logits, depth) in enumerate(kept[:8]):
        n = int(lengths[r])
        assert torch.equal(early.depths[k, :n], depth)
        assert torch.equal(got[k, :n].isinf(), logits.isinf())
        assert float((got[k, :n] - logits).nan_to_num(0).abs().max()) <= CLOSE


def test_halted_keys_matter():
    """The negative control: without the keys of halted words the others come out otherwise."""
    model, heads = tagger("bert")
    found = judged(model, heads, 8, window_rule(dict.fromkeys(heads, -BOUND), 3))
    recipe = tokee(BOUND, window=3, heads=heads)
    from exeunt.models import token_layers as parts

    real = parts.BertLayer.keys_values

    def without(self, hidden, arguments, tokens):
        k, v = real(self, hidden, arguments, tokens)
        gone = torch.ones(len(k), dtype=torch.bool)
        gone[tokens.active if tokens.active is not None else slice(None)] = False
        return k.masked_fill(gone[:, None, None], 0), v.masked_fill(gone[:, None, None], 0)

    parts.BertLayer.keys_values = without
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "token_layers", parts.token_layers)
        try:
            with pytest.raises(AssertionError):
                same(model, recipe, *found, (8,), close=1e-3)
        finally:
            parts.BertLayer.keys_values = real
    same(model, recipe, *found, (8,))


def test_both_ways_to_freeze_differ():
    model, heads = tagger("bert")
    ids, mask, lengths = rows(8, seed=1)
    words = random_words(lengths, 1)
    got = {}
    for norm in ("post", "pre"):
        with torch.no_grad(), exeunt.attach(model, tokee(BOUND, window=3, norm=norm, heads=heads)):
            got[norm] = model(input_ids=ids, attention_mask=mask, words=words).logits
    assert float((got["post"] - got["pre"]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_nothing_halts_nothing_changes(name):
    model, heads = tagger(name)
    ids, mask, lengths = rows(5)
    words, labels = random_words(lengths), torch.randint(CLASSES, ids.shape)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        want = model(**inputs)
        with exeunt.attach(model, tokee(0.0, heads=heads)) as early:
            got = model(**inputs, words=words)
            copied = copy.deepcopy(model)(**inputs, words=words)
            pickled = pickle.loads(pickle.dumps(model))(**inputs)
        after = model(**inputs)
    assert type(got) is type(want)
    for other in (got, copied, pickled, after):
        assert torch.equal(other.logits, want.logits) and torch.equal(other.loss, want.loss)
    report = early.report()
    assert set(report.histogram) == {5} and report.layer_tokens == ids.numel() * 6 and report.key_tokens == 0


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_exits_on_a_copy_halt_the_same_words(norm):
    model, heads = tagger("bert")
    ids, mask, lengths = rows(8, seed=1)
    inputs = dict(input_ids=ids, attention_mask=mask, words=random_words(lengths, 1))
    recipe = tokee(BOUND, window=3, norm=norm, heads=heads)
    with torch.no_grad(), exeunt.attach(model, recipe) as early:
        want, twin = model(**inputs).logits, copy.deepcopy(model)
    with torch.no_grad(), exeunt.attach(twin, recipe) as again:
        got = twin(**inputs).logits
    assert len(early.depths.unique()) > 3 and torch.equal(again.depths, early.depths) and torch.equal(got, want)
    assert all("forward" not in vars(m) for m in model.modules())
    texts, states = dict(input_ids=ids, attention_mask=mask), []
    for encoder in (model.bert, twin.bert):  # whole texts that leave have their mask there as well
        with torch.no_grad(), exeunt.attach(encoder, deebert(0.9, heads=heads)) as early:
            states.append(encoder(**texts).last_hidden_state)
        assert len(early.report().histogram) > 1
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert"])
def test_padding_on_the_left(name):
    model, heads = tagger(name)
    if name == "deberta-v2":
        pytest.skip("its convolution reaches over the padding")
    ids, _, lengths = rows(6, longest=20, seed=4)
    words, recipe = random_words(lengths, 2, 20), tokee(BOUND, window=3, heads=heads)
    mask = (torch.arange(20) < lengths[:, None]).long()
    order = torch.stack([torch.arange(20).roll(20 - int(n)) for n in lengths])
    positions = (torch.arange(20) - (20 - lengths)[:, None]).clamp_min(0)
    extra = dict(position_ids=positions) if name == "bert" else {}
    with torch.no_grad(), exeunt.attach(model, recipe) as early:
        right = model(input_ids=ids, attention_mask=mask, words=words).logits
        depths = early.depths
        left = model(
            input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order), words=words.gather(1, order), **extra
        ).logits
        assert torch.equal(early.depths, depths.gather(1, order))
    assert float((left - right.gather(1, order[..., None].expand(-1, -1, CLASSES))).abs().max()) <= 1e-5


def test_a_head_of_your_own():
    model, heads = tagger("bert")

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.out = model.bert, model.classifier

        def forward(self, input_ids, attention_mask):
            return self.out(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    own = Own().eval()
    ids, mask, lengths = rows(8, seed=1)
    words, recipe = random_words(lengths, 1), tokee(BOUND, window=3, heads=heads)
    with torch.no_grad():
        with exeunt.attach(model, recipe):
            want = model(input_ids=ids, attention_mask=mask, words=words).logits
        with exeunt.attach(own, recipe):
            got = own(ids, mask, words=words)
    assert torch.equal(got, want)


def test_refusals(monkeypatch):
    model, heads = tagger("bert")
    ids, mask, lengths = rows(3)
    words, good = random_words(lengths), tokee(BOUND, heads=heads)

    def refused(match, *, model=model, recipe=good, **inputs):
        with pytest.raises(ValueError, match=match), torch.no_grad(), exeunt.attach(model, recipe):
            model(**{"input_ids": ids, "attention_mask": mask, "words": words, **inputs})

    refused("expected words=..., the words that tokens belong to, got none", words=None)
    refused(r"words that cover the text, integers \[3, 40\] like the ids, got \[3, 39\]", words=words[:, 1:])
    refused("words that cover the text, got some where attention_mask is 0", words=torch.ones_like(ids))
    refused("words that cover the text, integers .* got list", words=words.tolist())
    refused("without output_hidden_states", output_hidden_states=True)
    refused(r"expected attention_mask \[B, S\]", attention_mask=mask[:, None, None])
    refused("exit heads of width 32, got 16 at exit 0", recipe=tokee(heads=ClassifierHeads({0: LinearHead(16, 3)})))
    refused("exit heads of 3 labels like the model, got 5", recipe=tokee(heads=ClassifierHeads({0: LinearHead(32, 5)})))
    refused("heads that read one word, .* got AttentionHead",
            recipe=tokee(heads=ClassifierHeads({0: AttentionHead(32, 3, width=8)})))  # fmt: skip
    refused("got LinearHead with pooling 'mean'", recipe=tokee(heads=ClassifierHeads({0: LinearHead(32, 3, "mean")})))
    refused("expected a recipe with ClassifierHeads", recipe=tokee(exits=[1]))
    refused("transitions between 3 labels like the model, got 2",
            recipe=tokee(heads=heads, transitions=torch.ones(2, 2).bool()))  # fmt: skip
    refused("a measure of their logits, got saturation",
            recipe=Recipe((1,), measure("saturation"), WordWindow(0.5), Freeze(), heads))  # fmt: skip
    refused("a model with logits for every token, got a bare BertModel", model=model.bert)
    refused("expected logits of every token from BertForSequenceClassification", model=build("bert"))
    refused("layers of kind BertLayer, .* got AlbertLayer", model=build("albert", "ForTokenClassification"))
    refused("layers of kind BertLayer, .* got MPNetLayer", model=build("mpnet", "ForTokenClassification"))
    model.set_attn_implementation("eager")
    with exeunt.attach(model, good):
        pass
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    refused("expected an encoder with eager or sdpa attention, .* got flex_attention")
    monkeypatch.undo()
    monkeypatch.setattr(model.bert.encoder.layer[2], "forward", model.bert.encoder.layer[1].forward)
    refused("words cannot leave on their own in BertForTokenClassification")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="exits must lie in 0..4 for 6 layers"):
        exeunt.attach(model, tokee(exits=[5], heads=ClassifierHeads({5: LinearHead(32, 3)})))
    with pytest.raises(ValueError, match="no calibration for a policy over words"):
        exeunt.attach(model, good, calibration="somewhere.json")
    with pytest.raises(ValueError, match="use Freeze\\('post'\\) or a later exit"):
        deberta = build("deberta-v2", "ForTokenClassification")
        exeunt.attach(deberta, tokee(norm="pre", heads=tagger_heads(deberta)))
    with exeunt.attach(model, good), pytest.raises(ValueError, match="without exits, got a BertForTokenClassification"):
        exeunt.attach(model, good)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                 num_attention_heads=4)
    )  # fmt: skip
    with pytest.raises(ValueError, match="state strategy for a language model's skipped layers, got Freeze"):
        exeunt.attach(llama, tokee(exits=[1]))


def test_a_row_with_nan_never_halts():
    model, heads = tagger("bert")
    ids, mask, lengths = rows(4, seed=1)
    words = random_words(lengths, 1)
    embeds = model.bert.embeddings.word_embeddings(ids).detach().clone()
    embeds[1, 3] = math.nan
    with torch.no_grad(), exeunt.attach(model, tokee(1.0, window=1, heads=heads)) as early:
        model(inputs_embeds=embeds, attention_mask=mask, words=words)
    in_words = words[1] > 0
    assert bool((early.depths[1][in_words] == 5).all())
    assert int(early.depths[0].max()) == 0
