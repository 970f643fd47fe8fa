"""attach under stock generate: bit-identical when nothing leaves, equal to the oracle when something does."""

from __future__ import annotations

import copy
import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import StoppingCriteria

import exeunt
from exeunt.heads import ExitHead, ExitHeads, Probe, Translator
from oracle import Oracle, prompts, tiny_llama

NEW = 14
NEVER = math.inf


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def generate(model, inputs, new=NEW, **kw):
    torch.manual_seed(3)
    settings = {"max_new_tokens": new, "do_sample": False, **kw}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **settings)


def trained_like_heads(exits, size=32, seed=5):
    """Heads with random weights, so that every part of them matters."""
    g = torch.Generator().manual_seed(seed)
    heads = {}
    for e in exits:
        head = ExitHead(Translator(size), Probe(size))
        with torch.no_grad():
            head.translator.down.weight.copy_(torch.randn(head.translator.down.weight.shape, generator=g) * 0.1)
            head.probe.weight.copy_(torch.randn(size, generator=g) * 0.3)
        heads[e] = head
    return ExitHeads(heads)


def positions(mask):
    """Position ids as generate makes them from a left-padded mask."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


class RowCounter:
    """Rows that reach each MLP in single-token forwards: executed layer-rows, counted without exeunt."""

    def __init__(self, model):
        self.rows = [0] * len(model.model.layers)
        self.largest = 0
        self.handles = [
            layer.mlp.register_forward_pre_hook(lambda m, args, i=i: self.note(i, args[0]))
            for i, layer in enumerate(model.model.layers)
        ]

    def note(self, i, x):
        if x.shape[1] == 1:
            self.rows[i] += x.shape[0]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for h in self.handles:
            h.remove()


class Shift(LogitsProcessor):
    def __call__(self, ids, scores):
        scores = scores.clone()
        scores[:, 5:50] -= 1.0
        return scores


MODES = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_k=20, temperature=0.9),
    "beams": dict(num_beams=3),
    "sampled beams": dict(num_beams=2, do_sample=True),
    "several sequences": dict(do_sample=True, num_return_sequences=2),
    "processors": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, logits_processor=LogitsProcessorList([Shift()])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_bit_identical_while_nothing_leaves(model, mode, batch, dtype):
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    inputs = prompts(batch)
    plain = generate(model, inputs, **MODES[mode])
    for confidence in ("margin", "saturation"):
        with exeunt.attach(model, exeunt.recipes.calm([0, 2, 4], NEVER, confidence=confidence)) as early:
            got = generate(model, inputs, **MODES[mode])
        assert torch.equal(got.sequences, plain.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
        report = early.report()
        assert report.steps == NEW - 1 and report.layer_rows == report.full_layer_rows > 0
        assert report.checks == (3 * report.steps if confidence == "margin" else 0)


def test_bit_identical_while_nothing_leaves_although_rows_end(model):
    inputs = prompts()
    ends = generate(model, inputs).sequences[0, inputs["input_ids"].shape[1] + 3].item()
    plain = generate(model, inputs, eos_token_id=ends, pad_token_id=0)
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], NEVER)):
        got = generate(model, inputs, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))


THRESHOLDS = {"margin": 0.3, "max_prob": 0.45, "neg_entropy": -2.2, "saturation": 0.8, "probe": 0.55}


@pytest.mark.parametrize("own_heads", [False, True], ids=["model head", "own heads"])
@pytest.mark.parametrize("confidence", THRESHOLDS)
def test_equals_the_oracle_that_runs_everything(model, confidence, own_heads):
    exits = [0, 2, 3, 4]
    if confidence == "probe" and not own_heads:
        pytest.skip("a probe is an exit head of its own")
    heads = trained_like_heads(exits) if own_heads else None
    inputs = prompts()
    oracle = Oracle(model, exits, confidence, THRESHOLDS[confidence], heads)
    expected = oracle.generate(**inputs, new_tokens=NEW)
    recipe = exeunt.recipes.calm(exits, THRESHOLDS[confidence], confidence=confidence, heads=heads)
    with exeunt.attach(model, recipe) as early, RowCounter(model) as counted:
        got = generate(model, inputs)
    assert oracle.closest > 1e-5, "pick thresholds that no score comes close to"
    assert torch.equal(got.sequences[:, inputs["input_ids"].shape[1] :], expected)
    report = early.report()
    assert torch.equal(torch.stack(report.exit_layers), torch.stack(oracle.depths))
    torch.testing.assert_close(torch.stack(got.logits[1:]), torch.stack(oracle.logits), rtol=1e-3, atol=1e-3)

    # Rows really executed, counted at the MLPs, are those that the depths say and that the report claims.
    depths = torch.stack(oracle.depths)
    assert counted.rows == [int((depths >= i).sum()) for i in range(6)]
    assert report.layer_rows == sum(counted.rows) < report.full_layer_rows
    assert report.fill_ins == int((5 - depths).sum())
    assert len({*depths.flatten().tolist()}) > 1, "the case must leave at several depths"
    if confidence in ("saturation", "probe"):
        assert report.head_reads == report.steps and report.checks == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("confidence", ["margin", "neg_entropy"])
def test_each_row_leaves_as_it_would_alone(model, confidence, seed):
    exits, threshold = [1, 2, 4], THRESHOLDS[confidence]
    inputs = prompts(seed=seed + 10)
    recipe = exeunt.recipes.calm(exits, threshold, confidence=confidence)
    with exeunt.attach(model, recipe) as early:
        together = generate(model, inputs).sequences
        depths = torch.stack(early.report().exit_layers)
        for row in range(4):
            early.reset_report()
            alone = generate(model, {k: v[row : row + 1] for k, v in inputs.items()}).sequences[0]
            assert torch.equal(together[row], alone)
            assert torch.equal(depths[:, row], torch.stack(early.report().exit_layers)[:, 0])
    # Contract 2 speaks of runs whose scores keep clear of their thresholds: the products are not batch-invariant.
    oracle = Oracle(model, exits, confidence, threshold)
    oracle.generate(**inputs, new_tokens=NEW)
    assert oracle.closest > 1e-4
    assert len(set(depths.flatten().tolist())) > 1


def test_decaying_threshold_follows_the_formula(model):
    exits, value, tau = [1, 3], 0.35, 4.0
    inputs = prompts()
    oracle = Oracle(model, exits, "margin", lambda t: min(max(0.9 * value + 0.1 * math.exp(-tau * t / NEW), 0.0), 1.0))
    expected = oracle.generate(**inputs, new_tokens=NEW)
    constant = Oracle(model, exits, "margin", value)
    constant.generate(**inputs, new_tokens=NEW)
    with exeunt.attach(model, exeunt.recipes.calm(exits, value, decay=tau)) as early:
        got = generate(model, inputs)
    assert torch.equal(got.sequences[:, 9:], expected)
    assert torch.equal(torch.stack(early.report().exit_layers), torch.stack(oracle.depths))
    assert any(not torch.equal(a, b) for a, b in zip(oracle.depths, constant.depths, strict=True))


@pytest.mark.parametrize("confidence", ["margin", "saturation"])
def test_everything_leaves_at_once(model, confidence):
    lowest = exeunt.confidence.measure(confidence).low
    recipe = exeunt.recipes.calm([0], lowest, confidence=confidence)
    with exeunt.attach(model, recipe) as early, RowCounter(model) as counted:
        generate(model, prompts())
    report = early.report()
    assert counted.rows == [4 * (NEW - 1), 0, 0, 0, 0, 0]
    assert report.histogram == {0: 4 * (NEW - 1)} and report.layers_per_token == 1.0
    assert report.head_reads == report.steps


@pytest.mark.parametrize("mode", ["sampled", "beams", "several sequences"])
def test_exits_under_other_ways_to_generate(model, mode):
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], 0.3)) as early, RowCounter(model) as counted:
        got = generate(model, prompts(), **MODES[mode])
    report = early.report()
    assert 0 < sum(counted.rows) == report.layer_rows < report.full_layer_rows
    assert torch.isfinite(torch.stack(got.logits)).all()


def test_finished_rows_run_no_layers(model):
    inputs, recipe = prompts(), exeunt.recipes.calm([0, 2], 0.2)
    with exeunt.attach(model, recipe) as early:
        free = generate(model, inputs).sequences[:, 9:]
        ends = free[0, 4].item()
        early.reset_report()
        with RowCounter(model) as counted:
            got = generate(model, inputs, eos_token_id=ends, pad_token_id=0).sequences[:, 9:]
    live = torch.ones(4, dtype=torch.bool)
    depths = torch.stack(early.report().exit_layers)
    for t in range(got.shape[1]):
        assert torch.equal(got[live, t], free[live, t]), "rows that go on are not disturbed by rows that have ended"
        live = live & (got[:, t] != ends)
        if t < len(depths):
            assert torch.equal(depths[t] == -1, ~live)
    assert early.report().histogram[-1] == int((depths == -1).sum()) > 0
    assert sum(counted.rows) == early.report().layer_rows == int((depths + 1).sum())


def test_prompts_chunks_and_assisted_decoding_run_at_full_depth(model):
    inputs = prompts(1, length=24)
    with exeunt.attach(model, exeunt.recipes.calm([0], 0.0)) as early:
        prompt = model(**inputs, use_cache=True)
        cache = prompt.past_key_values
        chunk = model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
        assert early.report().steps == 0 and early.report().full_forwards == 2
        model.generate(**inputs, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=202)
        assert early.report().steps == 0
    plain = model(**inputs, use_cache=True)
    assert torch.equal(prompt.logits, plain.logits)
    again = model(input_ids=inputs["input_ids"][:, :5], past_key_values=plain.past_key_values)
    assert torch.equal(chunk.logits, again.logits)


def test_prompt_lookup_gives_the_unattached_tokens(model):
    ids = torch.arange(3, 9).repeat(1, 5)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    kw = dict(max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=202)
    plain = model.generate(**inputs, **kw)
    with exeunt.attach(model, exeunt.recipes.calm([0], 0.0)):
        assert torch.equal(model.generate(**inputs, **kw), plain)


def test_manual_loop(model):
    """A hand-written loop gives what generate gives."""
    inputs = prompts(2)
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], 0.3)), torch.no_grad():
        want = generate(model, inputs).sequences
        mask, cache, ids = inputs["attention_mask"], DynamicCache(), inputs["input_ids"]
        out, tokens = model(**inputs, position_ids=positions(mask), past_key_values=cache, use_cache=True), []
        for _ in range(NEW):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            position = positions(mask)[:, -1:]
            out = model(input_ids=tokens[-1], attention_mask=mask, position_ids=position, past_key_values=cache)
        assert torch.equal(torch.cat([ids, *tokens], 1), want)


def test_two_generations_at_once_keep_their_own_state(model):
    inputs = [prompts(2, seed=1), prompts(2, seed=2)]
    ends = 7
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], 0.3)), torch.no_grad():
        want = [generate(model, i, eos_token_id=ends).sequences for i in inputs]
        runs = []
        for i in inputs:
            cache = DynamicCache()
            out = model(**i, position_ids=positions(i["attention_mask"]), past_key_values=cache, use_cache=True)
            runs.append([i["attention_mask"], cache, [out.logits[:, -1].argmax(-1, keepdim=True)]])
        for _ in range(NEW - 1):
            for run in runs:  # one token of each in turn
                run[0] = torch.cat([run[0], run[0].new_ones(2, 1)], 1)
                position = positions(run[0])[:, -1:]
                out = model(input_ids=run[2][-1], attention_mask=run[0], position_ids=position, past_key_values=run[1])
                run[2].append(out.logits[:, -1].argmax(-1, keepdim=True))
    for i, run, w in zip(inputs, runs, want, strict=True):
        got = torch.cat([i["input_ids"], *run[2]], 1)[:, : w.shape[1]]
        ended = (w[:, 9:] == ends).cumsum(-1) > 0
        assert torch.equal(got[:, 9:][~ended], w[:, 9:][~ended])


def test_tied_embeddings_and_bfloat16():
    model = tiny_llama(tie_word_embeddings=True).bfloat16()
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], 0.3, confidence="max_prob")) as early:
        out = generate(model, prompts())
    assert out.sequences.shape == (4, 9 + NEW) and early.report().layer_rows < early.report().full_layer_rows


class Explode(StoppingCriteria):
    def __call__(self, ids, scores, **kw):
        if ids.shape[1] > 13:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)


def attributes(model):
    return {name: set(vars(m)) for name, m in model.named_modules()}


def test_an_exception_leaves_the_model_detachable_and_intact(model):
    plain, before = generate(model, prompts()), attributes(model)
    config = model.generation_config.to_dict()
    early = exeunt.attach(model, exeunt.recipes.calm([1], 0.3))
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts(), stopping_criteria=StoppingCriteriaList([Explode()]))

    def fail(module, args):
        raise RuntimeError("in the middle of a step")

    handle = model.model.layers[3].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="middle"):
        generate(model, prompts())
    handle.remove()
    assert generate(model, prompts()).sequences.shape[1] == 9 + NEW  # still usable while attached
    early.detach()
    early.detach()
    assert attributes(model) == before and model.generation_config.to_dict() == config
    assert not model.model.embed_tokens._forward_pre_hooks
    again = generate(model, prompts())
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


def test_a_copy_of_an_attached_model_is_a_stock_model(model):
    plain = generate(model, prompts())
    with exeunt.attach(model, exeunt.recipes.calm([0], 0.0)) as early:
        twin = copy.deepcopy(model)
        got = generate(twin, prompts())
        assert early.report().steps == 0
        assert model.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(got.sequences, plain.sequences)


@pytest.mark.parametrize("own_config", [False, True])
def test_auto_compile_is_off_while_attached(model, monkeypatch, own_config):
    seen = []
    stock = type(model)._valid_auto_compile_criteria

    def spy(self, kwargs, config):
        seen.append(config.disable_compile)
        return stock(self, kwargs, config)

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", spy)
    kw = dict(generation_config=GenerationConfig(max_new_tokens=3)) if own_config else dict(max_new_tokens=3)
    with exeunt.attach(model, exeunt.recipes.calm([1], 0.5)):
        model.generate(**prompts(), do_sample=False, **kw)
    assert seen and all(seen) and not model.generation_config.disable_compile


def test_a_second_generation_on_the_same_cache_starts_anew(model):
    """Rows that ended in one turn are alive in the next, also if that begins with a single token."""
    inputs = prompts()
    with exeunt.attach(model, exeunt.recipes.calm([0, 2], 0.2)) as early:
        free = generate(model, inputs).sequences[:, 9:]
        cache = DynamicCache()
        first = generate(model, inputs, eos_token_id=free[0, 4].item(), pad_token_id=0, past_key_values=cache)
        assert early.report().histogram[-1] > 0
        early.reset_report()
        mask = torch.cat([inputs["attention_mask"], torch.ones(4, first.sequences.shape[1] - 9, dtype=torch.long)], 1)
        again = dict(input_ids=first.sequences, attention_mask=mask)
        generate(model, again, new=4, past_key_values=cache)
    assert -1 not in early.report().histogram


def test_weights_replaced_under_an_attached_model_are_used(model):
    model = copy.deepcopy(model)
    with exeunt.attach(model, exeunt.recipes.calm([0], 0.0)):
        before = generate(model, prompts(), new=2).logits[1]
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2.0)
        after = generate(model, prompts(), new=2).logits[1]
    torch.testing.assert_close(after, 2.0 * before)


def test_output_that_a_caller_keeps_is_not_overwritten(model):
    """The logits buffer is reused only while nobody holds it."""
    inputs = prompts(2)
    with exeunt.attach(model, exeunt.recipes.calm([1, 3], 0.3)), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache, kept, copies = out.past_key_values, [], []
        for t in range(10):
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, t + 1, dtype=torch.long)], 1)
            out = model(input_ids=torch.tensor([[5 + t], [50 + t]]), attention_mask=mask, past_key_values=cache)
            kept.append(out.logits)
            copies.append(out.logits.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_bad_input_gets_one_sentence(model):
    calm, attach = exeunt.recipes.calm, exeunt.attach
    with pytest.raises(ValueError, match=r"exits must lie in 0\.\.4 for 6 layers, got \[5\]"):
        attach(model, calm([2, 5], 0.5))
    with pytest.raises(ValueError, match=r"exits must lie in 0\.\.4 for 6 layers, got \[-1\]"):
        attach(model, calm([-1], 0.5))
    with pytest.raises(ValueError, match="expected a causal language model with a stack of decoder layers, got Linear"):
        attach(torch.nn.Linear(2, 2), calm([0], 0.5))
    with pytest.raises(ValueError, match="output embedding|causal language model"):
        attach(model.model, calm([0], 0.5))
    heads = trained_like_heads([1]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"exit heads must be torch.float32 on cpu like the model, got torch.bfloat16"):
        attach(model, calm(heads=heads, threshold=0.5))
    with pytest.raises(ValueError, match="expected exit heads of width 32, got 48"):
        attach(model, calm(heads=trained_like_heads([1], size=48), threshold=0.5))
    with pytest.raises(
        ValueError, match=r"margin reads the head, which must be torch.float32 or .*, got torch.float64"
    ):
        attach(copy.deepcopy(model).double(), calm([1], 0.5))
    early = attach(model, calm([1], 0.5))
    with pytest.raises(ValueError, match="a LlamaForCausalLM that has them"):
        attach(model, calm([1], 0.5))
    early.detach()
    attach(model, calm([1], 0.5)).detach()


def test_what_is_no_model_or_no_recipe_gets_one_sentence(model):
    calm = exeunt.recipes.calm
    with pytest.raises(TypeError, match="attach: expected a model, an nn.Module, got 'gpt2'"):
        exeunt.attach("gpt2", calm([1], 0.5))
    for wrong in ("calm", None):
        with pytest.raises(TypeError, match=rf"attach: expected a Recipe like .*, got {wrong!r}"):
            exeunt.attach(model, wrong)
    with pytest.raises(TypeError, match="calm: expected a list of exits, got 3"):
        calm(3, 0.5)
    with pytest.raises(TypeError, match="Threshold: expected a number, or one for each exit, got '0.5'"):
        calm([1], "0.5")
    with pytest.raises(TypeError, match=r"expected a state strategy of exeunt.states, got 'defer'"):
        exeunt.recipes.free(1, state="defer")


def memory_of_another_kind(name):
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_experts_per_tok=1)
    more = {
        "Mamba": {},
        "MiniMax": dict(head_dim=8, num_local_experts=2, **heads),
        "Jamba": dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=2, **heads),
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **more[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Mamba", "Jamba", "MiniMax"])
def test_layers_with_another_memory_than_keys_and_values_are_refused(name):
    model = memory_of_another_kind(name)
    with pytest.raises(ValueError, match="^attach: expected .*$"):
        exeunt.attach(model, exeunt.recipes.calm([1], 0.5))
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_failed_attach_leaves_nothing_behind(model):
    before = attributes(model)
    with pytest.raises(ValueError):
        exeunt.attach(model, exeunt.recipes.calm([99], 0.5))
    assert attributes(model) == before
