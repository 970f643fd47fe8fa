"""Propagate, eager and lazy, against the oracle that runs everything: whatever happens to the rows and their cache."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import DynamicCache

import exeunt
from exeunt.cache import ExitCacheLayer
from exeunt.models import KeyValueWeights
from exeunt.states import Propagate
from oracle import RunEverything, prompts, tiny_llama
from scripts import Run, assert_same, happenings, keys_and_values

LAYERS, NEW = 6, 12
THRESHOLDS = {"margin": 0.3, "saturation": 0.8}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(LAYERS)


def recipe_of(exits, threshold, lazy, confidence="margin", limit=32):
    recipe = exeunt.recipes.calm(exits, threshold, confidence=confidence)
    return dataclasses.replace(recipe, state=Propagate(lazy, limit))


def generate(model, inputs, new=NEW, **kw):
    torch.manual_seed(3)
    return model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **kw})


def assert_same_cache(got, want):
    for a, b in zip(keys_and_values(got), keys_and_values(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


MODES = [{}, dict(num_beams=3), dict(num_beams=2, do_sample=True), dict(do_sample=True)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("limit", [1, 4, 32])
def test_lazy_gives_the_tokens_of_the_oracle_under_generate(model, mode, limit):
    exits, threshold = [0, 2, 4], 0.3
    with RunEverything(model, exits, "margin", threshold) as oracle:
        expected = generate(model, prompts(), past_key_values=(theirs := DynamicCache()), **mode)
    assert oracle.closest > 1e-5 and len({*torch.stack(oracle.depths).flatten().tolist()}) > 1
    for lazy in (False, True):
        with exeunt.attach(model, recipe_of(exits, threshold, lazy, limit=limit)) as early:
            got = generate(model, prompts(), past_key_values=(ours := DynamicCache()), **mode)
        assert torch.equal(got, expected)
        assert not ours.layers[0].state.pending, "settled at the end of generate"
        beams = mode.get("num_beams", 1)
        depths = [torch.stack(d).reshape(NEW - 1, -1, beams) for d in (early.report().exit_layers, oracle.depths)]
        if beams == 1:
            assert torch.equal(*depths)
            assert_same_cache(ours, theirs)
        else:  # beams of nearly equal scores may stand in another order
            assert torch.equal(*(d.sort().values for d in depths))


@given(
    script=st.lists(happenings, min_size=1, max_size=10),
    batch=st.integers(1, 4),
    length=st.integers(4, 8),
    padding=st.lists(st.integers(0, 3), max_size=4),
    exits=st.sets(st.integers(0, LAYERS - 2), min_size=1),
    confidence=st.sampled_from(sorted(THRESHOLDS)),
    share=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    lazy=st.booleans(),
    limit=st.sampled_from([1, 3, 32]),
    seed=st.integers(0, 99),
)
@example([("steps", 1), ("reorder", [0])], 2, 4, [], {0}, "margin", 1.0, True, 1, 2)  # rows repeated, batch as before
@settings(deadline=None, max_examples=40)
def test_whatever_happens_to_the_cache(
    model, script, batch, length, padding, exits, confidence, share, lazy, limit, seed
):
    threshold, script = THRESHOLDS[confidence] * share, [*script, ("steps", 2), ("read",)]
    assume(exeunt.confidence.measure(confidence).high >= threshold)
    with RunEverything(model, exits, confidence, threshold) as oracle:
        theirs = Run(model, batch, length, padding, seed, script)
    assume(oracle.closest > 1e-4)
    with exeunt.attach(model, recipe_of(exits, threshold, lazy, confidence, limit)) as early:
        ours = Run(model, batch, length, padding, seed, script)
        assert_same(early, ours, oracle, theirs)


def manual(model, cache, new=6, seed=5):
    """Decoding steps without generate: nobody says when they end."""
    ids = torch.randint(3, 203, (2, new), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(new)]


def prefilled(model, batch=2):
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + 5 * batch).view(batch, 5), past_key_values=cache)
    return cache


def test_lazy_runs_nothing_of_the_layers_that_nobody_needs(model):
    with exeunt.attach(model, recipe_of([1], 0.0, lazy=True)) as early:
        cache = prefilled(model)
        ran = []
        handle = model.model.layers[5].input_layernorm.register_forward_hook(lambda *_: ran.append(5))
        manual(model, cache)
        handle.remove()
        assert not ran and early.report().fill_ins == 0 and cache.layers[5].state.waiting == 6
        assert cache.get_seq_length(5) == 11
        assert cache.layers[3].keys.shape[2] == 11  # reading settles this layer
        assert early.report().fill_ins == 6 * 2 and 3 not in cache.layers[3].state.pending
        cache.crop(-1)
        assert not cache.layers[0].state.pending and cache.get_seq_length(5) == 10


def test_pending_tokens_are_bounded(model):
    with exeunt.attach(model, recipe_of([1], 0.0, lazy=True, limit=3)):
        cache = prefilled(model)
        state = cache.layers[0].state
        seen = []
        for t in range(9):
            manual(model, cache, new=1, seed=t)
            seen.append(state.waiting)
    assert seen == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_what_an_earlier_recipe_left_is_settled_by_it(model):
    """A cache is handed on to other exits, and to the model without any, with nothing missing."""
    outcomes = []
    for lazy in (False, True):
        cache = prefilled(model)
        with exeunt.attach(model, recipe_of([1], 0.0, lazy)):
            manual(model, cache)
        with exeunt.attach(model, recipe_of([3], 0.0, lazy)):
            logits = manual(model, cache)
        outcomes.append([*logits, *manual(model, cache, new=2)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Synchronisations(TorchDispatchMode):
    """Counts the ops that make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        self.count += func.overloadpacket.__name__ in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("confidence", ["margin", "saturation"])
def test_each_exit_point_waits_for_the_device_once(model, confidence, lazy, monkeypatch):
    # As on a device without kv_fill: on CPU it reads its row lists, which there is no waiting.
    monkeypatch.setattr(KeyValueWeights, "find", staticmethod(lambda structure, packed: None))
    ids = torch.tensor([[5], [9], [70], [130]])

    def waits():
        cache = prefilled(model, batch=4)
        with torch.no_grad(), Synchronisations() as seen:
            for _ in range(6):
                model(input_ids=ids, past_key_values=cache)
        return seen.count

    alone = waits()
    with exeunt.attach(model, recipe_of([1, 3], THRESHOLDS[confidence], lazy, confidence)) as early:
        attached = waits()
    depths = early.report().exit_layers
    assert len({*torch.stack(depths).flatten().tolist()}) > 1
    reached = sum(int((d >= e).any()) for d in depths for e in (1, 3))
    assert 0 < attached - alone <= reached


def test_two_generations_take_turns(model):
    """What one cache owes is its own affair."""
    with exeunt.attach(model, recipe_of([0, 2, 4], 0.3, lazy=True)):
        alone = [manual(model, prefilled(model), seed=s) for s in (1, 2)]
        caches = [prefilled(model), prefilled(model)]
        ids = [torch.randint(3, 203, (2, 6), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
        with torch.no_grad():
            for t in range(6):
                for k in (0, 1):
                    logits = model(input_ids=ids[k][:, t : t + 1], past_key_values=caches[k]).logits
                    assert torch.equal(logits, alone[k][t])


def test_two_generations_on_two_threads(model):
    seeds = [1, 2, 3, 4]
    with exeunt.attach(model, recipe_of([0, 2, 4], 0.3, lazy=True)):
        alone = [generate(model, prompts(seed=s), new=24) for s in seeds]
        with ThreadPoolExecutor(2) as pool:
            together = list(
                pool.map(lambda s: model.generate(**prompts(seed=s), max_new_tokens=24, do_sample=False), seeds)
            )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_cache_with_pending_tokens_dies_with_its_last_reference(model):
    """What a layer owes refers to the model, never back to the cache: keys and values do not wait for the collector."""
    gc.disable()
    try:
        with exeunt.attach(model, recipe_of([1], 0.0, lazy=True)):
            cache = prefilled(model)
            manual(model, cache)
            alive = weakref.ref(cache.layers[4])
            assert cache.layers[4].state.pending
            del cache
            assert alive() is None
    finally:
        gc.enable()


def run(model, early, steps=5):
    cache = prefilled(model, batch=2)
    early.reset_report()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([[5], [9]]), past_key_values=cache).logits for _ in range(steps)]
    report = copy.copy(early.report())  # reading keys below makes layers write what they still owe, one by one
    return torch.stack(logits), [layer.keys for layer in cache.layers], report


@pytest.mark.parametrize("lazy", [False, True])
def test_kv_fill_writes_what_the_stock_layers_would(model, lazy, monkeypatch):
    with exeunt.attach(model, recipe_of([1, 3], 0.3, lazy)) as early:
        logits, keys, report = run(model, early)
        monkeypatch.setattr(early, "_weights", None)
        slow_logits, slow_keys, slow = run(model, early)
    assert report.fill_ins == slow.fill_ins > 0
    assert report.captures == 0 and slow.captures == slow.fill_ins
    torch.testing.assert_close(logits, slow_logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(keys, slow_keys, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_replaced_weights_are_used_at_once(model):
    model = copy.deepcopy(model)
    attention = model.model.layers[4].self_attn
    with exeunt.attach(model, recipe_of([1], 0.0, False)) as early:
        _, before, _ = run(model, early)
        attention.v_proj.weight.data = attention.v_proj.weight.data * 2
        attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight * 3)
        model.model.layers[5].input_layernorm.weight.data.mul_(2)
        _, after, report = run(model, early)
        assert report.captures == 0  # still kv_fill, on the new weights
    torch.testing.assert_close(after[4][:, :, -1], before[4][:, :, -1] * 3, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[5][:, :, -1], before[5][:, :, -1] * 2, rtol=1e-4, atol=1e-4)


def test_packed_projections_follow_the_model(model):
    model = copy.deepcopy(model)
    attention = model.model.layers[4].self_attn
    packed = dataclasses.replace(recipe_of([1], 0.0, True), state=Propagate(lazy=True, packed=True))
    with exeunt.attach(model, recipe_of([1], 0.0, True)) as early:
        logits, keys, _ = run(model, early)
    with exeunt.attach(model, packed) as early:
        same, before, _ = run(model, early)
        assert torch.equal(same, logits) and all(map(torch.equal, before, keys))
        with torch.no_grad():
            attention.k_proj.weight.mul_(2)
        _, after, _ = run(model, early)
        attention.k_proj.weight.data = attention.k_proj.weight.data * 2
        _, later, report = run(model, early)
        assert report.captures == 0
    for kind, times in ((after, 2), (later, 4)):
        torch.testing.assert_close(kind[4][:, :, -1], before[4][:, :, -1] * times, rtol=1e-4, atol=1e-4)


def test_packed_projections_are_for_a_model_on_cpu():
    elsewhere = SimpleNamespace(model=None, layers=(), weight=torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match=r"^attach: Propagate\(packed=True\) needs a model on cpu, got meta"):
        KeyValueWeights.find(elsewhere, packed=True)


class Adapter(torch.nn.Module):
    """What an adapter library leaves in the place of a projection."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 5


@pytest.mark.parametrize("how", ["module", "hook"])
def test_an_adapter_makes_the_stock_layers_serve(model, how):
    model = copy.deepcopy(model)
    attention = model.model.layers[4].self_attn
    with exeunt.attach(model, recipe_of([1], 0.0, False)) as early:
        _, before, _ = run(model, early)
        if how == "module":
            attention.k_proj = Adapter(attention.k_proj)
        else:
            attention.k_proj.register_forward_hook(lambda module, args, out: out * 5)
        _, after, report = run(model, early)
    assert report.captures == report.fill_ins > 0 and "by the stock layers" in str(report)
    torch.testing.assert_close(after[4][:, :, -1], before[4][:, :, -1] * 5, rtol=1e-4, atol=1e-4)


def test_a_failed_fill_in_can_be_tried_again(model):
    with exeunt.attach(model, recipe_of([1], 0.0, lazy=True)):
        cache = prefilled(model)
        manual(model, cache)

        def fail(module, args):
            raise RuntimeError("not now")

        handle = model.model.layers[4].self_attn.k_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="not now"):
            cache.layers[4].keys  # noqa: B018
        handle.remove()
        eager = prefilled(model)
    with exeunt.attach(model, recipe_of([1], 0.0, lazy=False)):
        manual(model, eager)
    assert isinstance(cache.layers[4], ExitCacheLayer)
    assert_same_cache(cache, eager)


def test_bad_input_gets_one_sentence(model):
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        Propagate(limit=0)
    other = tiny_llama(LAYERS, seed=1)
    cache = prefilled(model)
    with exeunt.attach(model, recipe_of([1], 0.0, lazy=True)):
        manual(model, cache)
    with exeunt.attach(other, recipe_of([1], 0.0, lazy=True)):
        with pytest.raises(ValueError, match="one that this LlamaForCausalLM filled, got one of another Llama"):
            manual(other, cache)
        with pytest.raises(ValueError, match="expected 6 layers like the model's, got 3"):
            manual(other, DynamicCache(config=tiny_llama(3).config))
