"""Structure discovery and calling a stock layer on some rows."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="models are transformers models")
from exeunt import models
from exeunt.models.layer_call import RowTaker
from oracle import tiny_llama


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


def test_a_norm_that_the_op_cannot_express_is_applied_by_the_model():
    model = small("Gemma", head_dim=8)  # multiplies by 1 + weight
    with torch.no_grad():
        model.model.norm.weight.normal_()
    assert models.discover(model).final_norm is None


def test_a_head_with_its_own_scaling_is_refused():
    model = small("Granite", logits_scaling=4.0)
    with pytest.raises(ValueError, match="expected the logits of GraniteForCausalLM to be head"):
        models.discover(model)


def test_a_model_without_decoder_layers_is_refused():
    for bad in (
        torch.nn.Linear(2, 2),
        transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, vocab_size=9)),
    ):
        with pytest.raises(ValueError, match=f"stack of decoder layers, got {type(bad).__name__}"):
            models.discover(bad)


def test_capture_gives_the_layers_own_keys_and_values_and_runs_nothing_else():
    model = tiny_llama(layers=2)
    layer, seen = model.model.layers[0], []
    handle = layer.mlp.register_forward_pre_hook(lambda m, a: seen.append(a))
    cache = transformers.DynamicCache()
    hidden = torch.randn(3, 1, 32)
    positions = torch.tensor([[4], [7], [9]])
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    arguments = dict(attention_mask=None, position_embeddings=rotary, past_key_values=cache)
    call = models.LayerCall(layer.forward, hidden, arguments, RowTaker(3))
    rows = torch.tensor([2, 0])
    got = call.capture(rows)
    assert not seen and cache.get_seq_length() == 0
    layer(hidden, **arguments)
    handle.remove()
    torch.testing.assert_close(got.keys, cache.layers[0].keys[rows])
    torch.testing.assert_close(got.values, cache.layers[0].values[rows])
    whole = call.capture(None)
    whole.store(whole.keys, whole.values)  # writes to the cache in the layer's name
    assert torch.equal(cache.layers[0].keys[:, :, 1], cache.layers[0].keys[:, :, 0])


def test_row_taker_picks_what_has_a_batch_dimension():
    take, rows = RowTaker(3), torch.tensor([2, 1])
    mask, shared = torch.arange(6).view(3, 1, 2), torch.zeros(1, 4)
    assert torch.equal(take(mask, rows), mask[rows]) and take(mask, rows) is take(mask, rows)
    assert take(shared, rows) is shared and take(None, rows) is None and take(True, rows) is True
    pair = take((mask, shared), rows)
    assert torch.equal(pair[0], mask[rows]) and pair[1] is shared
    other = torch.tensor([0])
    assert torch.equal(take(mask, other), mask[other]) and torch.equal(take(mask, rows), mask[rows])
