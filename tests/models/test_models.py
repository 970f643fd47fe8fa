"""Structure discovery and calling a stock layer on some rows."""

from __future__ import annotations

import os
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="models are transformers models")
import exeunt
from exeunt import models
from exeunt.models.layer_call import RowTaker
from oracle import tiny_llama

sys.path.insert(0, os.path.dirname(__file__))
import zoo


def small(kind, **kw):
    torch.manual_seed(0)
    config = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **kw,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_finds_the_parts_of_llama_like_models(kind):
    model = small(kind)
    s = models.discover(model)
    assert s.layers == tuple(model.model.layers) and s.tail == (model.model.norm,) and s.head is model.lm_head
    assert s.final_norm.kind == "rms" and s.final_norm.weight is model.model.norm.weight
    assert s.final_norm.eps == model.model.norm.variance_epsilon


def test_discovery_leaves_no_hooks_and_keeps_training_mode():
    model = small("Llama").train()
    models.discover(model)
    assert model.training and all(not m._forward_hooks for m in model.modules())


def test_a_norm_that_multiplies_by_one_and_its_weight():
    model = small("Gemma", head_dim=8)
    with torch.no_grad():
        model.model.norm.weight.normal_()
    norm = models.discover(model).final_norm
    assert (norm.kind, norm.offset) == ("rms", 1.0) and torch.equal(norm.weight, 1.0 + model.model.norm.weight)


def test_a_norm_that_the_op_cannot_express_is_applied_by_the_model():
    model = small("Llama")
    stock = model.model.norm.forward
    model.model.norm.forward = lambda hidden: stock(hidden) * 1.5
    s = models.discover(model)
    assert s.final_norm is None and s.tail == (model.model.norm,) and s.form.plain
    state, logits = torch.randn(4, 32), torch.empty(4, 97)
    s.exit_stats(state, logits_out=logits)
    torch.testing.assert_close(logits, model.lm_head(model.model.norm(state)))


class Bent(torch.nn.Module):
    """A head that is no product with its weight."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight).sin()


FORMS = {
    "granite": models.HeadForm(scale=1 / 3.0),
    "cohere": models.HeadForm(scale=0.3),
    "gemma2": models.HeadForm(softcap=5.0),
    "marian": models.HeadForm(bias="final_logits_bias"),
    "t5": models.HeadForm(before=32**-0.5),
    "mpt": models.HeadForm(),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_a_model_does_around_its_head(name):
    model = zoo.make(name)
    found = models.discover(model)
    assert found.form == FORMS[name]
    assert found.batched.get("position_bias") == (0 if name == "mpt" else None)


@pytest.mark.parametrize("name", ["granite", "t5"])
def test_training_is_refused_where_its_loss_would_be_of_other_logits(name):
    with pytest.raises(ValueError, match=r"training: expected a decoder alone whose logits are head\(norm\(hidden"):
        models.discover(zoo.make(name)).trainable()


def test_a_scale_that_no_configuration_names_is_found_by_its_effect():
    model = small("Llama")
    stock = type(model).forward

    def forward(*args, **kwargs):
        out = stock(model, *args, **kwargs)
        out.logits = out.logits * 0.7
        return out

    model.forward = forward
    form = models.discover(model).form
    assert form.scale == pytest.approx(0.7, rel=1e-5) and form.before == 1.0


def test_an_unknown_head_is_left_to_measures_that_do_not_read_it():
    model = small("Llama")
    model.lm_head = Bent(model.lm_head)
    assert models.discover(model).form is None
    with pytest.raises(
        ValueError, match="margin reads the head, which must be a product .* got Bent of LlamaForCausal"
    ):
        exeunt.attach(model, exeunt.recipes.calm([0], 0.5))
    ids = torch.arange(3, 9)[None]
    with exeunt.attach(model, exeunt.recipes.calm([0], -1.0, confidence="saturation")) as early:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert early.report().histogram == {0: 3}


def test_a_layer_whose_rows_depend_on_each_other_is_refused():
    model = small("Llama")
    model.model.layers[1].input_layernorm.forward = lambda hidden: hidden - hidden.mean(0, keepdim=True)
    with pytest.raises(
        ValueError, match="keys and values of layer 1 of LlamaForCausalLM depend on more than their own"
    ):
        models.discover(model)


def test_layers_that_share_a_cache_layer_are_refused():
    model = small("Llama")
    model.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(ValueError, match=r"decoder layer 2 of LlamaForCausalLM to hand .* own cache layer, got \[1\]"):
        models.discover(model)


def test_a_model_without_decoder_layers_is_refused():
    for bad in (
        torch.nn.Linear(2, 2),
        transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, vocab_size=9)),
    ):
        with pytest.raises(ValueError, match=f"stack of decoder layers, got {type(bad).__name__}"):
            models.discover(bad)


def call_of(model, positions, length, hidden=None):
    """Layer 0 about to decode one token at [B, 1] or [1, 1] positions of a cache of that length; its arguments."""
    hidden = torch.randn(3, 1, 32) if hidden is None else hidden
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    mask = torch.ones(3, 1, 1, length + 1, dtype=torch.bool)
    arguments = dict(attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    seen = models.stand_in(transformers.DynamicCache(), length)
    return models.LayerCall(model.model.layers[0].forward, hidden, dict(arguments), RowTaker(3), seen), arguments


def stock_keys_and_values(model, call, arguments):
    cache = transformers.DynamicCache()
    model.model.layers[0](call.hidden, **{**arguments, "attention_mask": None}, past_key_values=cache)
    return cache.layers[0].keys, cache.layers[0].values


def test_capture_gives_the_layers_own_keys_and_values_and_runs_nothing_else():
    model, seen = tiny_llama(layers=2), []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.append(a))
    call, arguments = call_of(model, torch.tensor([[4], [7], [9]]), 9)
    rows = torch.tensor([2, 0])
    some, whole = call.pick(rows).capture(), call.capture()
    handle.remove()
    assert not seen and some.layer == whole.layer == 0
    keys, values = stock_keys_and_values(model, call, arguments)
    assert torch.equal(whole.keys, keys) and torch.equal(whole.values, values)
    torch.testing.assert_close(some.keys, keys[rows])
    torch.testing.assert_close(some.values, values[rows])


@pytest.mark.parametrize("shared", [False, True], ids=["positions of each row", "one position for all rows"])
def test_calls_of_several_tokens_join(shared):
    """Rows of any of them, in any order and as often as wanted, with masks of different lengths."""
    model = tiny_llama(layers=2)
    positions = [torch.tensor([[t]]) if shared else torch.tensor([[t], [t + 3], [t + 5]]) for t in (4, 6, 7)]
    calls = [call_of(model, p, 8 + t) for t, p in enumerate(positions)]
    rows = [torch.tensor(r, dtype=torch.long) for r in ([2, 0, 0, 1], [], [1])]
    got = models.LayerCall.join([(call, r) for (call, _), r in zip(calls, rows, strict=True)]).capture()
    stock = [stock_keys_and_values(model, *call) for call in calls]
    for k, part in enumerate((got.keys, got.values)):
        want = torch.cat([pair[k][r] for pair, r in zip(stock, rows, strict=True)])
        assert part.shape == (5, 2, 1, 8)
        torch.testing.assert_close(part, want)


def test_a_stand_in_says_how_long_the_cache_is_and_holds_nothing():
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    seen = models.stand_in(cache, 7)
    assert isinstance(seen, transformers.DynamicCache) and seen.get_seq_length() == 7 and not seen.layers
    assert cache.get_seq_length() == 4 and len(cache.layers) == 1


def test_row_taker_picks_what_has_a_batch_dimension():
    take, rows = RowTaker(3), torch.tensor([2, 1])
    mask, shared = torch.arange(6).view(3, 1, 2), torch.zeros(1, 4)
    assert torch.equal(take(mask, rows), mask[rows]) and take(mask, rows) is take(mask, rows)
    assert take(shared, rows) is shared and take(None, rows) is None and take(True, rows) is True
    pair = take((mask, shared), rows)
    assert torch.equal(pair[0], mask[rows]) and pair[1] is shared
    other = torch.tensor([0])
    assert torch.equal(take(mask, other), mask[other]) and torch.equal(take(mask, rows), mask[rows])


def test_what_some_rows_returned_is_laid_out_for_all():
    rows, bias, shared = torch.tensor([2, 0]), torch.arange(1.0, 9.0).view(2, 1, 4), torch.ones(1, 1, 4)
    got, same, nothing = models.spread((bias, shared, None), rows, 3)
    assert torch.equal(got[rows], bias) and not got[1].any() and same is shared and nothing is None
    assert models.spread(bias[:1], rows[:1], 3).shape == (1, 1, 4)  # one row's value serves that row everywhere
