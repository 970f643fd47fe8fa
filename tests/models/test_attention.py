"""The registered attention implementation, alone and under attach, against stock attention."""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="models are transformers models")
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import exeunt
from exeunt.models import attention
from exeunt.states import Defer, Evict, Propagate

sys.path.insert(0, os.path.dirname(__file__))
import zoo

#: Families whose attention is transformers' interface on every supported version, and others that it has since.
PLAIN = ["llama", "mixtral", "qwen3", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "granite", "olmo2", "starcoder2"]
BOUNDED = ["mistral, sliding window", "gemma2", "gemma3, text", "cohere2"]
OTHERS = ["opt", "stablelm", "t5", "bart", "marian", "whisper, decoder"]


def pair(name):
    """The same model twice: with eager attention, and with exeunt's."""
    eager = zoo.make(name, attn_implementation="eager")
    try:
        ours = zoo.make(name, attn_implementation=exeunt.register_attention())
    except KeyError:
        pytest.skip(f"{name} does not go through the interface on this version")
    return eager, ours


@pytest.mark.parametrize("name", PLAIN + BOUNDED + OTHERS)
def test_generates_what_eager_attention_does(name):
    eager, ours = pair(name)
    given = zoo.inputs(eager)
    want = zoo.generate(eager, given)
    counter = attention.Counter()
    attention.counting(counter)
    try:
        got = zoo.generate(ours, given)
    finally:
        attention.counting(None)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=2e-3)
    if name in PLAIN + BOUNDED:
        assert counter["ragged_attention"] >= 11 * zoo.LAYERS, counter  # every step; the prompt where it is short


def test_long_prompts_are_torchs_own_to_the_bit():
    ours = zoo.make("llama", attn_implementation=exeunt.register_attention())
    stock = zoo.make("llama", attn_implementation="sdpa")
    given = zoo.inputs(stock, length=attention.FEW + 1)
    with torch.no_grad():
        assert torch.equal(ours(**given).logits, stock(**given).logits)
        given = zoo.inputs(stock, length=attention.FEW)
        torch.testing.assert_close(ours(**given).logits[:, 3:], stock(**given).logits[:, 3:], rtol=1e-4, atol=1e-4)


def masks(model, mask, new, **given):
    """Logits of ``new`` tokens in one forward behind a prompt, for the whole mask [B, K]."""
    ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(4))
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        first = mask.shape[1] - new
        cache = model(ids[:, :first], attention_mask=mask[:, :first], position_ids=position[:, :first]).past_key_values
        return model(
            ids[:, first:], attention_mask=mask, position_ids=position[:, first:], past_key_values=cache
        ).logits


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("hole", [False, True], ids=["padding", "hole"])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_chunks_and_holes(name, new, hole):
    """A padded row's range serves; what is not one range of keys is torch's own, as several tokens' windows are."""
    eager, ours = pair(name)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1, :4] = 0
    if hole:
        mask[2, 5:8] = 0
    counter = attention.Counter()
    attention.counting(counter)
    got = masks(ours, mask, new)
    attention.counting(None)
    torch.testing.assert_close(got, masks(eager, mask, new), rtol=1e-4, atol=1e-4)
    assert bool(counter["torch: a mask that is not one range of keys"]) is (hole or name != "llama")


def test_a_static_cache_is_longer_than_what_is_in_it():
    eager, ours = pair("llama")
    outs = []
    for model in (eager, ours):
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids = torch.arange(3, 17).view(2, 7)
        with torch.no_grad():
            prompt = model(ids[:, :5], past_key_values=cache, cache_position=torch.arange(5)).logits
            step = model(ids[:, 5:6], past_key_values=cache, cache_position=torch.tensor([5])).logits
            outs.append(torch.cat([prompt, step], 1))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 20.0], ids=["torch", "kernel"])
def test_columns_of_a_mask_beyond_the_keys_mean_nothing(softcap):
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 7), -torch.inf).triu(1)[None, None]
    exeunt.register_attention()
    attend = ALL_ATTENTION_FUNCTIONS["exeunt"]
    more = {} if softcap is None else {"softcap": softcap}
    got, _ = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3, **more)
    want, _ = attend(torch.nn.Module(), query, key, value, mask[..., :5], scaling=0.3, **more)
    assert torch.equal(got, want)


def test_training_and_dropout_are_torchs_own():
    eager, ours = pair("llama")
    ids = torch.arange(3, 15).view(2, 6)
    for model in (eager, ours):
        model(ids, labels=ids).loss.backward()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def with_sinks(implementation):
    """GPT-OSS: every head has a sink, every other layer a window."""
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=8, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("why", ["gradients", "autocast", "float64", "no kernel"])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "gemma2", "sinks"])
def test_torchs_own_attention_keeps_windows_and_sinks_without_padding(name, why, monkeypatch):
    """A prompt of many tokens, one of few, a chunk and a step: masks that say nothing, since the layer knows."""
    implementations = "eager", exeunt.register_attention()
    models = [with_sinks(i) for i in implementations] if name == "sinks" else pair(name)
    if name == "sinks" and why == "float64":
        pytest.skip("its experts have no float64")
    ids, found = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(2)), []
    if why == "no kernel":
        monkeypatch.setattr(attention, "_unable", lambda *args: why)
    for model in models:
        model = model.double() if why == "float64" else model
        kind = torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast")
        with torch.set_grad_enabled(why == "gradients"), kind:
            parts = []
            for lengths in ((attention.FEW + 4, 3, 1), (attention.FEW - 4, 3, 1)):
                cache, done = transformers.DynamicCache(), 0
                for count in lengths:
                    parts.append(model(ids[:, done : done + count], past_key_values=cache).logits.float().detach())
                    done += count
        found.append(torch.cat(parts, 1))
    off, tolerance = (found[0] - found[1]).abs(), 0.05 if why == "autocast" else 1e-4
    # Experts that rounding chooses differently are not attention's: most tokens are what counts there.
    most = off.amax(-1).median() if why == "autocast" else off.max()
    assert most <= tolerance * found[0].abs().max()


def test_softcap_has_neither_dropout_nor_sinks():
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    exeunt.register_attention()
    with pytest.raises(NotImplementedError, match="expected neither dropout nor sinks beside softcap, got dropout=0.5"):
        ALL_ATTENTION_FUNCTIONS["exeunt"](torch.nn.Module(), query, key, value, None, dropout=0.5, softcap=20.0)


def test_an_encoder_attends_both_ways():
    from transformers import BertConfig, BertModel

    config = dict(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    outs = []
    for kind in ("eager", exeunt.register_attention()):
        torch.manual_seed(0)
        try:
            model = BertModel(BertConfig(**config, attn_implementation=kind)).eval()
        except KeyError:
            pytest.skip("encoders do not go through the interface on this version")
        ids, mask = torch.arange(3, 27).view(3, 8), torch.ones(3, 8, dtype=torch.long)
        mask[1, 5:] = 0
        with torch.no_grad():
            outs.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


EXITS = [0, 1, 3]


def attached(model, state, threshold=0.3):
    return exeunt.attach(model, dataclasses.replace(exeunt.recipes.calm(EXITS, threshold), state=state))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", *BOUNDED])
@pytest.mark.parametrize("state", [Propagate(), Propagate(lazy=True), Defer(), Evict()], ids=str)
def test_under_attach_it_gives_what_stock_attention_gives(name, state):
    eager, ours = pair(name)
    given = zoo.inputs(eager, batch=4)
    found = []
    for model in (eager, ours):
        flat = name in ("gemma2", "cohere2")  # whose logits are bound, or scaled down
        with attached(model, state, 0.03 if flat else 0.3) as early:
            out = zoo.generate(model, given, new=16)
        found.append((out, torch.stack(early.report().exit_layers), early.report()))
    (want, depths, _), (got, same, report) = found
    assert torch.equal(depths, same) and len(set(depths.flatten().tolist())) > 1
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=2e-3, atol=2e-3)
    served, all_calls = report.attention["ragged_attention"], sum(report.attention.values())
    assert "calls by ragged_attention" in str(report)
    prompts = zoo.LAYERS if name in BOUNDED else 0  # longer than the window
    assert served >= all_calls - prompts if not isinstance(state, Evict) else served > 0  # Evict's holes are masks


@pytest.mark.parametrize("padding", [0, 2], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_several_tokens_after_evictions_are_causal_and_keep_the_window(name, padding):
    found, ids = [], torch.randint(3, 90, (2, 15), generator=torch.Generator().manual_seed(6))
    for implementation in ("eager", "sdpa", exeunt.register_attention()):
        model, mask = zoo.make(name, attn_implementation=implementation), torch.ones(2, 15, dtype=torch.long)
        mask[1, :padding] = 0
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        with attached(model, Evict()) as early, torch.no_grad():
            cache, done, logits = transformers.DynamicCache(), 0, []
            for count in (4, 1, 1, 1, 1, 1, 1, 4, 1):
                here = slice(done, done := done + count)
                given = dict(attention_mask=mask[:, :done], position_ids=position[:, here])
                logits.append(model(ids[:, here], past_key_values=cache, **given).logits[:, -1])
        assert len(early.report().histogram) > 1
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("state", [Propagate(), Defer()], ids=str)
def test_no_keys_are_copied_for_rows_that_run_apart(state, monkeypatch):
    """Rows that left and tokens that come late attend to the cache as it lies."""
    model = zoo.make("llama", attn_implementation=exeunt.register_attention())
    given, gathered = zoo.inputs(model, batch=4), []
    for name in ("append", "append_at"):
        stock = getattr(exeunt.cache.ExitCacheLayer, name)

        def spy(self, *args, stock=stock, gather=True):
            gathered.append(gather)
            return stock(self, *args, gather=gather)

        monkeypatch.setattr(exeunt.cache.ExitCacheLayer, name, spy)
    with attached(model, state):
        gathered.clear()
        zoo.generate(model, given, new=16)
    assert gathered and not any(gathered)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bit_identical_while_nothing_leaves(name):
    model = zoo.make(name, attn_implementation=exeunt.register_attention())
    given = zoo.inputs(model)
    plain = zoo.generate(model, given)
    with attached(model, Propagate(), math.inf):
        got = zoo.generate(model, given)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_with_attention_of_their_own_keep_it(name):
    model = zoo.make(name, attn_implementation=exeunt.register_attention())
    stock = zoo.make(name)
    given = zoo.inputs(model)
    torch.testing.assert_close(
        torch.stack(zoo.generate(model, given).logits), torch.stack(zoo.generate(stock, given).logits)
    )


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_without_a_kernel(name, monkeypatch):
    """Prompts of few tokens are causal and rows that left are passed over where torch's attention serves, too."""
    runs = []
    for implementation in ("sdpa", exeunt.register_attention()):
        monkeypatch.setattr(attention, "_unable", lambda *args: "no kernel")
        model = zoo.make(name, attn_implementation=implementation)
        with exeunt.attach(model, exeunt.recipes.calm([0, 2], 0.5, confidence="margin")) as early:
            out = zoo.generate(model, zoo.inputs(model, batch=4))
        runs.append((out.sequences, torch.stack(out.logits), torch.cat(early.report().exit_layers)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][2], runs[1][2])
    assert len(runs[0][2].unique()) > 1
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-4)
    assert early.report().attention["torch: no kernel"] > 0
