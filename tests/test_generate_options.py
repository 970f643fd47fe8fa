"""What `generate` offers, with exits attached: kept, run at full depth with a warning, or refused with one sentence."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import DynamicCache, StaticCache, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import StoppingCriteria

import exeunt
from exeunt import limits
from oracle import prompts, tiny_llama

NEW = 8


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def never():
    return exeunt.recipes.calm([1, 3], math.inf)


def early_exits():
    return exeunt.recipes.calm([1, 3], 0.3)


def generate(model, inputs=None, **settings):
    torch.manual_seed(3)
    given = prompts() if inputs is None else inputs
    return model.generate(
        **given, **{"max_new_tokens": NEW, "do_sample": False, **settings}, return_dict_in_generate=True
    )


class Words:
    """A tokenizer as far as a streamer needs one."""

    def decode(self, ids, **settings):
        return "".join(f"{int(i)} " for i in ids)


class AfterFive(StoppingCriteria):
    def __call__(self, ids, scores, **settings):
        return torch.full((len(ids),), ids.shape[1] >= 14, dtype=torch.bool)


KEPT = {
    "hidden states": dict(output_hidden_states=True),
    "scores": dict(output_scores=True, output_logits=True),
    "stopping criteria": dict(stopping_criteria=StoppingCriteriaList([AfterFive()])),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
    "beam sample": dict(do_sample=True, num_beams=2),
    "bad words": dict(bad_words_ids=[[5], [6]], min_new_tokens=4, eos_token_id=7, pad_token_id=0),
}


def same(got, want):
    if isinstance(want, torch.Tensor):
        return torch.equal(got, want)
    if isinstance(want, (tuple, list)):
        return len(got) == len(want) and all(map(same, got, want))
    return True


@pytest.mark.parametrize("option", KEPT)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_option_is_kept(attention, option):
    model = tiny_llama(attn_implementation=attention)
    plain = generate(model, **KEPT[option])
    with exeunt.attach(model, never()):
        got = generate(model, **KEPT[option])
    assert plain.keys() == got.keys() and all(same(got[k], plain[k]) for k in plain if k != "past_key_values")
    with exeunt.attach(model, early_exits()) as early:
        got = generate(model, **KEPT[option])
    report = early.report()
    assert 0 < report.layer_rows < report.full_layer_rows and got.keys() == plain.keys()
    if option == "hidden states":  # a row that left stands still from there on
        for depths, states in zip(report.exit_layers, got.hidden_states[1:], strict=True):
            for row, depth in enumerate(depths.tolist()):
                for layer in range(depth + 2, 6):
                    assert torch.equal(states[layer][row], states[depth + 1][row])


def test_embeddings_instead_of_ids(model):
    embeds = dict(inputs_embeds=model.model.embed_tokens(prompts()["input_ids"]).detach())
    embeds["attention_mask"] = prompts()["attention_mask"]
    with exeunt.attach(model, early_exits()):
        want = generate(model).sequences[:, 9:]
        assert torch.equal(generate(model, embeds).sequences, want)


def test_a_streamer_gets_every_token(model):
    said = TextIteratorStreamer(Words(), skip_prompt=True)
    with exeunt.attach(model, early_exits()):
        ids = prompts(1)
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False, streamer=said)
    assert "".join(said).split() == [str(i) for i in out[0, 9:].tolist()]


FULL_DEPTH = {
    "assisted generation": dict(prompt_lookup_num_tokens=3, eos_token_id=202),
    "output_attentions": dict(output_attentions=True),
    "use_cache=False": dict(use_cache=False),
}


def greedy(model, recipe, given, **settings):
    """Tokens after a prompt of nine, and the depths at which they left."""
    with exeunt.attach(model, recipe) as early:
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False, **settings)
    return out[:, -NEW:], torch.stack(early.report().exit_layers)


@pytest.mark.parametrize("chunk", [3, 4, 8])
def test_a_prompt_in_chunks_runs_at_full_depth(model, chunk):
    """Nine tokens: the last chunk of four, or of eight, is a single token."""
    recipe = exeunt.recipes.calm([0], 0.0)
    given = dict(input_ids=prompts(1)["input_ids"])  # padded, chunks of 4.57 are misplaced
    want, depths = greedy(model, recipe, given)
    got, own = greedy(model, recipe, given, prefill_chunk_size=chunk)
    assert torch.equal(got, want) and torch.equal(own, depths)


def test_a_cache_goes_on_with_a_token_that_ends_rows(model):
    """Padding is the end's token in many models: as the last word of a prompt it ends nobody's answer."""
    recipe, given = exeunt.recipes.calm([0, 2], 0.2), prompts()
    end = greedy(model, recipe, given)[0][0, 4].item()
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=end)
    with exeunt.attach(model, recipe) as early:
        cache = DynamicCache()
        first = model.generate(**given, past_key_values=cache, **settings)
        mask = torch.cat([given["attention_mask"], torch.ones(4, first.shape[1] - 9, dtype=torch.long)], 1)
        assert (first[:, -1] == end).any() and cache.get_seq_length() == first.shape[1] - 1
        early.reset_report()
        again = model.generate(
            input_ids=first, attention_mask=mask, past_key_values=cache, output_logits=True,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
        assert early.report().full_forwards == 1 and len(early.report().histogram) > 1
    ended = (again.sequences[:, first.shape[1] :] == end).cumsum(1).bool()
    for t, logits in enumerate(again.logits):
        live = ~ended[:, t - 1] if t else torch.ones(4, dtype=torch.bool)
        assert bool(logits[live].abs().sum(-1).bool().all())


@pytest.mark.parametrize("recipe", [exeunt.recipes.calm([0, 2], 0.3, decay=4.0), exeunt.recipes.skipdecode(4, 1)])
def test_embeddings_are_as_long_a_prompt_as_ids(model, recipe):
    given = prompts(2)
    embeds = {**given, "inputs_embeds": model.model.embed_tokens(given["input_ids"]).detach()}
    del embeds["input_ids"]
    (want, depths), (got, own) = (greedy(model, recipe, g) for g in (given, embeds))
    assert torch.equal(got, want) and torch.equal(own, depths) and len(depths.unique()) > 1


@pytest.mark.parametrize("state", [exeunt.states.Propagate(), exeunt.states.Propagate(lazy=True),
                                   exeunt.states.Defer()], ids=str)  # fmt: skip
@pytest.mark.parametrize("confidence", ["margin", "saturation"])
@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(model, state, confidence, inside):
    """Close to float32 as long as the words are the same; keys and values are of two dtypes."""
    recipe = dataclasses.replace(exeunt.recipes.calm([1, 3], 0.4, confidence=confidence), state=state)
    whole, part = (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (inside, True))
    with whole, exeunt.attach(model, recipe) as early, part:
        got = generate(model, output_logits=True)
    with exeunt.attach(model, recipe):
        want = generate(model, output_logits=True)
    assert len(early.report().histogram) > 1
    same = (got.sequences[:, 9:] == want.sequences[:, 9:]).all(0).cumprod(0).bool()
    off = (torch.stack(got.logits) - torch.stack(want.logits)).abs().amax((1, 2))
    assert int(same.sum()) >= 2 and float(off[same].max()) < 0.1 * float(torch.stack(want.logits).abs().max())


def test_a_draft_by_the_first_layers_is_refused_before_it_starts(model):
    model = copy.deepcopy(model)
    plain = generate(model)
    with exeunt.attach(model, never()):
        with pytest.raises(ValueError, match="expected no assistant_early_exit=2, whose drafts fill"):
            model.generate(**prompts(1), max_new_tokens=4, assistant_early_exit=2)
        assert model.config.num_hidden_layers == 6
    assert torch.equal(generate(model).sequences, plain.sequences)


@pytest.mark.parametrize("own", ["argument", "configuration"])
def test_attentions_in_a_loop_of_ones_own_keep_it_at_full_depth(own):
    model, ids = tiny_llama(attn_implementation="eager"), torch.tensor([[5], [6], [7]])
    if own == "configuration":
        model.config.output_attentions = True
    asked = dict(output_attentions=True) if own == "argument" else {}
    outs = []
    for recipe in (never(), exeunt.recipes.calm([0], 0.0)):
        with torch.no_grad(), exeunt.attach(model, recipe) as early, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            cache = model(**prompts(3), use_cache=True).past_key_values
            outs.append(model(input_ids=ids, past_key_values=cache, **asked))
        assert [str(w.message) for w in said if "exeunt" in str(w.message)] == [
            "exeunt: no exits in this step: output_attentions keeps it at full depth"
        ]
        assert early.report().steps == 0
    assert [a.shape for a in outs[1].attentions] == [(3, 4, 1, 10)] * 6
    assert torch.equal(outs[1].logits, outs[0].logits)


@pytest.mark.parametrize("option", FULL_DEPTH)
def test_what_keeps_a_generation_at_full_depth_says_so_once(option):
    model = tiny_llama(attn_implementation="eager")
    plain = generate(model, prompts(1), **FULL_DEPTH[option])
    recipe = exeunt.recipes.calm([0], 0.0)
    with exeunt.attach(model, recipe) as early, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = generate(model, prompts(1), **FULL_DEPTH[option])
        assert early.report().steps == 0
    assert torch.equal(got.sequences, plain.sequences) and same(got.get("attentions"), plain.get("attentions"))
    ours = [str(w.message) for w in said if "exeunt" in str(w.message)]
    assert ours == [f"exeunt: no exits in this generation: {option} keeps it at full depth"]


def test_other_caches_are_refused_before_anything_runs(model):
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    static = StaticCache(config=model.config, max_cache_len=40)
    with exeunt.attach(model, never()):
        ran.clear()
        with pytest.raises(
            ValueError, match="exits need the default DynamicCache, got StaticCache: leave out cache_imp"
        ):
            generate(model, cache_implementation="static")
        with pytest.raises(ValueError, match="got StaticCache"):
            generate(model, past_key_values=static)
        assert not ran
        with pytest.raises(ValueError, match="got StaticCache"), torch.no_grad():
            model(**prompts(), past_key_values=static)
    handle.remove()
    stubborn = copy.deepcopy(model)
    stubborn.generation_config.cache_implementation = "quantized"
    with pytest.raises(ValueError, match="got generation_config.cache_implementation='quantized'"):
        exeunt.attach(stubborn, never())


def test_other_attention_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(ValueError, match="expected eager or sdpa or exeunt attention, got 'flex_attention'"):
        exeunt.attach(model, never())


def test_other_versions_get_one_sentence(model, monkeypatch):
    for version in ("4.56.2", "6.0.0"):
        monkeypatch.setattr(limits.transformers, "__version__", version)
        with pytest.raises(ImportError, match=f"attach needs transformers>=4.57,<6, got {version}"):
            exeunt.attach(model, never())


def test_training_and_gradients_are_refused(model):
    model = copy.deepcopy(model)
    with exeunt.attach(model, never()):
        cache = model(**prompts()).past_key_values
        with pytest.raises(RuntimeError, match=r"decoding with exits has no gradient: run it under torch.no_grad\(\)"):
            model(input_ids=torch.ones(4, 1, dtype=torch.long), past_key_values=cache)
        model.train()
        with pytest.raises(RuntimeError, match=r"the model is in training mode: call model.eval\(\), or detach"):
            model(**prompts())
    model(**prompts()).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_is_a_stock_model(model, how):
    with exeunt.attach(model, exeunt.recipes.calm([0], 0.0)) as early:
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        got = generate(twin)
        assert early.report().steps == 0
    assert torch.equal(got.sequences, generate(model).sequences)


def test_saving_an_attached_model(model, tmp_path):
    with exeunt.attach(model, early_exits()):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(generate(again).sequences, generate(model).sequences)


@pytest.mark.parametrize("lazy", [False, True])
def test_limits_of_one_generation_do_not_reach_the_next(model, lazy):
    cache = DynamicCache()
    with exeunt.attach(model, exeunt.recipes.calm([1], 0.3, lazy=lazy)), torch.no_grad():
        generate(model, past_key_values=cache, eos_token_id=7, pad_token_id=0)
        state = cache.layers[0].state
        assert state.max_length is None and state.stop_ids is None and not state.full_depth
        model(input_ids=torch.full((4, 1), 7), past_key_values=cache)  # an end of the first generation, not of this
        assert state.finished is None or not state.finished.all()


def test_lora(model):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    plain = generate(adapted)
    assert not torch.equal(plain.sequences, generate(model).sequences)
    with exeunt.attach(adapted, never()):
        assert torch.equal(generate(adapted).sequences, plain.sequences)
    with exeunt.attach(adapted, early_exits()) as early:
        generate(adapted)
    assert early.report().layer_rows < early.report().full_layer_rows
    whole = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="margin reads the head, which must be a product"):
        exeunt.attach(peft.get_peft_model(copy.deepcopy(model), whole).eval(), early_exits())


def test_a_batch_of_several_adapters_runs_at_full_depth(model):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    adapted.add_adapter("two", settings)
    adapted.eval()
    names = ["default", "two", "__base__", "two"]
    plain = generate(adapted, adapter_names=names)
    with exeunt.attach(adapted, early_exits()) as early:
        with pytest.warns(UserWarning, match="no exits in this generation: adapter_names keeps it at full depth"):
            got = generate(adapted, adapter_names=names)
        assert torch.equal(got.sequences, plain.sequences) and early.report().steps == 0
        generate(adapted)
        assert early.report().layer_rows < early.report().full_layer_rows


def test_weights_that_accelerate_keeps_elsewhere(model):
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    moved = copy.deepcopy(model)
    for layer in moved.model.layers:
        accelerate.cpu_offload(layer, torch.device("cpu"))
    assert moved.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    plain = generate(moved)
    with exeunt.attach(moved, never()):
        assert torch.equal(generate(moved).sequences, plain.sequences)
    with exeunt.attach(model, early_exits()):
        want = generate(model).sequences
    with exeunt.attach(moved, early_exits()):
        assert torch.equal(generate(moved).sequences, want)
    accelerate.cpu_offload(moved.lm_head, torch.device("cpu"))
    with pytest.raises(ValueError, match="margin reads the head, which must be a product with a .* weight in memory"):
        exeunt.attach(moved, early_exits())
