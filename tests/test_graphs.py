"""Decoding steps in graphs, emulated on the CPU, against the same steps without and against the oracle."""

from __future__ import annotations

import copy
import dataclasses
import gc

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import DynamicCache

import exeunt
import graphs_on_cpu
from exeunt import graphs
from exeunt.states import Defer, Evict, Propagate
from oracle import RunEverything, prompts, tiny_llama
from scripts import Run, assert_same, happenings, keys_and_values

LAYERS, NEW, EXITS = 6, 14, [0, 2, 4]
MODES = ["exeunt", "sdpa", "eager"]


def llama(attention="exeunt", **config):
    exeunt.register_attention()
    return tiny_llama(LAYERS, attn_implementation=attention, **config)


@pytest.fixture(scope="module")
def model():
    return llama()


def recipe_of(threshold=0.3, lazy=False, exits=EXITS, confidence="margin"):
    recipe = exeunt.recipes.calm(exits, threshold, confidence=confidence)
    return dataclasses.replace(recipe, state=Propagate(lazy))


def generate(model, inputs, new=NEW, **kw):
    torch.manual_seed(3)
    return model.generate(
        **inputs, **{"max_new_tokens": new, "do_sample": False, **kw}, output_logits=True, return_dict_in_generate=True
    )  # fmt: skip


def one_run(model, inputs, recipe, **kw):
    with exeunt.attach(model, recipe) as early:
        cache = DynamicCache()
        out = generate(model, inputs, past_key_values=cache, **kw)
        return out.sequences, torch.stack(out.logits), cache, early.report()


def assert_same_run(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=2e-4)
    for a, b in zip(keys_and_values(got[2]), keys_and_values(want[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for name in ("steps", "tokens", "layer_rows", "fill_ins", "captures", "head_reads", "checks", "attention"):
        assert getattr(got[3], name) == getattr(want[3], name), name
    assert torch.equal(*(torch.cat(run[3].exit_layers) for run in (got, want)))


def check(monkeypatch, model, inputs, recipe, **kw):
    """The same run with graphs and without; the report of the one with."""
    want = one_run(model, inputs, recipe, **kw)
    with monkeypatch.context() as patch:
        graphs_on_cpu.on(patch)
        got = one_run(model, inputs, recipe, **kw)
    assert_same_run(got, want)
    return got[3]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("attention", MODES)
def test_same_tokens_depths_and_logits(attention, batch, lazy, monkeypatch):
    report = check(monkeypatch, llama(attention), prompts(batch), recipe_of(lazy=lazy))
    assert report.graphs["replayed"] > NEW and len(report.histogram) > 1
    assert not any(what.startswith("eager") for what in report.graphs)
    assert "replayed" in str(report)


@pytest.mark.parametrize("kw", [dict(num_beams=3), dict(num_beams=2, do_sample=True), dict(do_sample=True)], ids=str)
def test_other_ways_to_generate(model, kw, monkeypatch):
    assert check(monkeypatch, model, prompts(3), recipe_of(lazy=True), **kw).graphs["replayed"] > 0


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_all_leave_at_once_or_nobody_ever(attention, threshold, monkeypatch):
    model = llama(attention)
    report = check(monkeypatch, model, prompts(5), recipe_of(threshold))
    segments = 1 if threshold == 0.0 else len(EXITS) + 1
    assert report.graphs == {
        "segments run before they are recorded": segments, "recorded": segments, "replayed": segments * (NEW - 2),
    }  # fmt: skip
    if threshold == 1.0:
        graphs_on_cpu.on(monkeypatch)
        stock = generate(model, prompts(5))
        assert torch.equal(one_run(model, prompts(5), recipe_of(threshold))[0], stock.sequences)


def test_rows_that_end(model, monkeypatch):
    """Rows that met their end take part in no segment once somebody has left."""
    free = one_run(model, prompts(5), recipe_of())[0][:, 9:]
    stop = int(free[2, 4])
    kw = dict(eos_token_id=stop, pad_token_id=0)
    assert -1 in check(monkeypatch, model, prompts(5), recipe_of(), **kw).histogram


@pytest.mark.parametrize("confidence", ["saturation", "max_prob", "neg_entropy"])
def test_measures_that_look_at_two_states(model, confidence, monkeypatch):
    threshold = {"saturation": 0.8, "max_prob": 0.5, "neg_entropy": -1.5}[confidence]
    report = check(monkeypatch, model, prompts(4), recipe_of(threshold, confidence=confidence))
    assert len(report.histogram) > 1


def test_the_cache_grows(model, monkeypatch):
    """From 9 tokens beyond 64: the cache moves to tensors of twice the size, and everything is recorded anew."""
    inputs, new = prompts(3), 80
    ids = generate(model, inputs, new).sequences[:, 9:]

    def manual():
        cache = DynamicCache()
        with torch.no_grad(), exeunt.attach(model, recipe_of()) as early:
            mask = inputs["attention_mask"]
            model(**inputs, past_key_values=cache)
            logits = []
            for t in range(new):
                mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
                logits.append(model(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
            return torch.stack(logits), early.report()

    want, _ = manual()
    graphs_on_cpu.on(monkeypatch)
    got, report = manual()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert report.graphs["recorded"] > report.graphs["replayed"] / 20 and report.graphs["replayed"] > new


def test_the_next_generation_finds_its_graphs(model, monkeypatch):
    graphs_on_cpu.on(monkeypatch)
    with exeunt.attach(model, recipe_of(1.0)) as early:
        first = generate(model, prompts(4)).sequences
        recorded = early.report().graphs["recorded"]
        assert torch.equal(generate(model, prompts(4)).sequences, first)
        generate(model, prompts(4, seed=7), new=30)
        assert early.report().graphs["recorded"] == recorded == len(EXITS) + 1
        generate(model, prompts(3))
        assert early.report().graphs["recorded"] == 2 * recorded


def test_keys_that_somebody_keeps_stay_as_they_are(model, monkeypatch):
    graphs_on_cpu.on(monkeypatch)
    with exeunt.attach(model, recipe_of(1.0)):
        cache = DynamicCache()
        generate(model, prompts(4), past_key_values=cache)
        kept = [t for pair in keys_and_values(cache) for t in pair]
        before = [t.clone() for t in kept]
        del cache
        gc.collect()
        generate(model, prompts(4, seed=8))
        assert all(map(torch.equal, kept, before))


def test_two_generations_at_once(model, monkeypatch):
    """Two caches of one shape, a step of the one between steps of the other."""

    def both():
        with torch.no_grad(), exeunt.attach(model, recipe_of()):
            caches = [DynamicCache(), DynamicCache()]
            for seed, cache in enumerate(caches):
                model(**prompts(3, seed=seed), past_key_values=cache)
            ids = [torch.full((3, 1), 5), torch.full((3, 1), 9)]
            return torch.stack([model(ids[t % 2], past_key_values=caches[t % 2]).logits for t in range(16)])

    want = both()
    graphs_on_cpu.on(monkeypatch)
    torch.testing.assert_close(both(), want, rtol=1e-4, atol=2e-4)


def test_under_inference_mode_and_without(model, monkeypatch):
    want = one_run(model, prompts(3), recipe_of())[0]
    graphs_on_cpu.on(monkeypatch)
    with exeunt.attach(model, recipe_of()):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(generate(model, prompts(3)).sequences, want)


@given(
    script=st.lists(happenings, min_size=1, max_size=10),
    batch=st.integers(1, 4),
    length=st.integers(4, 8),
    padding=st.lists(st.integers(0, 3), max_size=4),
    exits=st.sets(st.integers(0, LAYERS - 2), min_size=1),
    share=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    lazy=st.booleans(),
    attention=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_whatever_happens_to_the_cache(script, batch, length, padding, exits, share, lazy, attention, seed):
    model, threshold = llama(attention), 0.3 * share
    script = [*script, ("steps", 3), ("read",)]
    with RunEverything(model, exits, "margin", threshold) as oracle:
        theirs = Run(model, batch, length, padding, seed, script)
    assume(oracle.closest > 1e-4)
    with pytest.MonkeyPatch.context() as patch:
        graphs_on_cpu.on(patch)
        with exeunt.attach(model, recipe_of(threshold, lazy, sorted(exits))) as early:
            ours = Run(model, batch, length, padding, seed, script)
    assert_same(early, ours, oracle, theirs)


# ---- what changes between steps


def steps(model, cache, ids=(5, 9, 17, 3)):
    with torch.no_grad():
        return torch.stack([model(torch.full((2, 1), i), past_key_values=cache).logits for i in ids])


def prefilled(model, batch=2):
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + 5 * batch).view(batch, 5), past_key_values=cache)
    return cache


def changed(model, change):
    """Steps, a change of the model, and steps again; and how often it was recorded before and after."""
    model = copy.deepcopy(model)
    with exeunt.attach(model, recipe_of()) as early:
        cache = prefilled(model)
        before = steps(model, cache)
        recorded = early.report().graphs["recorded"]
        undo = change(model)
        after = steps(model, cache)
        if undo is not None:
            undo()
        return torch.cat([before, after]), early.report().graphs, recorded


def replace_weight(model):
    layer = model.model.layers[3].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def replace_module(model):
    new = torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.normal_(new.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    model.model.layers[1].mlp.down_proj = new


def write_weight(model):
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.5)


def add_hook(model):
    return model.model.layers[3].mlp.register_forward_hook(lambda module, args, out: out * 1.5).remove


@pytest.mark.parametrize("change", [replace_weight, replace_module, write_weight, add_hook])
def test_a_model_that_changes(model, change, monkeypatch):
    want, _, _ = changed(model, change)
    graphs_on_cpu.on(monkeypatch)
    got, counts, recorded = changed(model, change)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert recorded > 0
    if change in (replace_weight, replace_module):
        assert counts["weights replaced: recorded anew"] == 1 and counts["recorded"] > recorded
    elif change is write_weight:
        assert "weights replaced: recorded anew" not in counts
    else:
        assert counts["eager steps: hooks on the layers"] == 4


# ---- what cannot be in a graph runs without, and says why


def refusal(model, recipe, monkeypatch, inputs=None, **kw):
    report = check(monkeypatch, model, prompts(3) if inputs is None else inputs, recipe, **kw)
    reasons = [what for what in report.graphs if what.startswith("eager")]
    assert len(reasons) == 1, report.graphs
    return reasons[0]


@pytest.mark.parametrize("state", [Defer(), Evict()], ids=str)
def test_other_state_strategies(model, state, monkeypatch):
    recipe = dataclasses.replace(recipe_of(), state=state)
    assert refusal(model, recipe, monkeypatch) == f"eager steps: the state strategy {type(state).__name__}"


def reads_a_value(model, value):
    """A layer that looks at a value on the host."""
    mlp = model.model.layers[4].mlp
    forward = mlp.forward

    def looking(x):
        return forward(x) if value(x) else forward(x) * 2

    mlp.forward = looking
    return model


@pytest.mark.parametrize(
    "value", [lambda x: float(x.sum()) > 0, lambda x: len(x[x > 0]) > 3, lambda x: len(x.nonzero()) > 3,
              lambda x: torch.tensor([1.0, 2.0]).sum().add(0) is not None], ids=["item", "mask", "nonzero", "tensor"]
)  # fmt: skip
def test_layers_that_read_on_the_host(model, value, monkeypatch):
    reading = reads_a_value(copy.deepcopy(model), value)
    assert "on the host" in refusal(reading, recipe_of(), monkeypatch)


def test_autocast(model, monkeypatch):
    graphs_on_cpu.on(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16), exeunt.attach(model, recipe_of(1.0)) as early:
        steps(model, prefilled(model))
    assert early.report().graphs == {"eager steps: autocast": 4}


def test_hidden_states_that_are_asked_for(model, monkeypatch):
    def states():
        with torch.no_grad(), exeunt.attach(copy.deepcopy(model), recipe_of(1.0)) as early:
            cache = prefilled(early.model)
            return torch.stack([
                torch.cat(early.model(torch.full((2, 1), i), past_key_values=cache, output_hidden_states=True)
                          .hidden_states)
                for i in (5, 9, 17)
            ]), early.report()  # fmt: skip

    want, _ = states()
    graphs_on_cpu.on(monkeypatch)
    got, report = states()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert report.graphs == {"eager steps: output_hidden_states": 3}


# ---- planted bugs: what a graph does not see has to be brought to it


load, new_store = graphs._Piece.load, graphs._Store.__init__


def without(name):
    """``load`` that leaves out one kind of input."""

    def planted(self, given):
        held = getattr(self, name)
        before = [t.clone() for t in (held if isinstance(held, list) else [held])]
        first = not getattr(self, "loaded", False)
        load(self, given)
        if not first:
            for t, old in zip(held if isinstance(held, list) else [held], before, strict=True):
                t.copy_(old)
        self.loaded = True

    return planted


def padding_with_places(self, given):
    load(self, given)
    self.slots.fill_(given.step.length)


def graphs_of_all_stores(store, layers, capacity, pieces={}):  # noqa: B006
    new_store(store, layers, capacity)
    store.pieces = pieces


@pytest.mark.parametrize(
    "where, name, bug",
    [
        *((graphs._Piece, "load", without(name)) for name in ("rows", "slots", "hidden", "tensors", "masks")),
        (graphs._Piece, "load", padding_with_places),
        (graphs._Store, "holds", lambda self, layers: True),
        (graphs._Store, "free", True),
        (graphs._Store, "__init__", graphs_of_all_stores),
        (graphs._Watched, "same", lambda self: True),
    ],
    ids=["rows", "slots", "hidden", "tensors", "masks", "padding", "another cache", "keys that are kept",
         "grown cache", "replaced weight"],
)  # fmt: skip
def test_planted_bugs_are_caught(model, where, name, bug, monkeypatch):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, ValueError, graphs_on_cpu.FreedMemory)):
        if name == "same":
            test_a_model_that_changes(model, replace_weight, monkeypatch)
        elif name == "holds":
            test_two_generations_at_once(model, monkeypatch)
        elif name == "free":
            test_keys_that_somebody_keeps_stay_as_they_are(model, monkeypatch)
        elif name == "__init__":
            test_the_cache_grows(model, monkeypatch)
        else:
            test_same_tokens_depths_and_logits("exeunt", 5, False, monkeypatch)
