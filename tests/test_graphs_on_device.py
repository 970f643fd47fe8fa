"""Decoding steps in real CUDA graphs: the same runs with and without, streams, and memory that comes back."""

from __future__ import annotations

import copy
import gc
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers models")
from transformers import DynamicCache

import backends
import exeunt
from oracle import prompts, tiny_llama
from test_graphs import assert_same_run, one_run, recipe_of, replace_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.on_device(), reason="needs a CUDA device and exeunt._cuda"),
]


def llama(attention="exeunt"):
    exeunt.register_attention()
    return tiny_llama(6, attn_implementation=attention).cuda()


def inputs(batch):
    return {k: v.cuda() for k, v in prompts(batch).items()}


def without():
    return mock.patch("exeunt.graphs.recorder_for", lambda device: None)


@pytest.mark.parametrize("attention", ["exeunt", "sdpa", "eager"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_graphs_give_what_eager_steps_do(batch, lazy, attention):
    model, recipe = llama(attention), recipe_of(lazy=lazy)
    with without():
        want = one_run(model, inputs(batch), recipe)
    got = one_run(model, inputs(batch), recipe)
    assert_same_run(got, want)
    assert got[3].graphs["replayed"] > 10 and not any(what.startswith("eager") for what in got[3].graphs)


def prefilled(model):
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 13, device="cuda").view(2, 5), past_key_values=cache)
    return cache


def test_steps_on_streams_in_turn():
    """Graphs share memory: a replay on another stream waits for the one before it."""
    model = llama()

    def both(streams):
        with torch.no_grad(), exeunt.attach(model, recipe_of()):
            caches = [prefilled(model), prefilled(model)]
            torch.cuda.synchronize()
            found = []
            for t in range(24):
                with torch.cuda.stream(streams[t % 2]):
                    ids = torch.full((2, 1), 5 + t, device="cuda")
                    found.append(model(ids, past_key_values=caches[t % 2]).logits)
            torch.cuda.synchronize()
            return torch.stack(found)

    same = torch.cuda.current_stream()
    with without():
        want = both([same, same])
    torch.testing.assert_close(both([torch.cuda.Stream(), torch.cuda.Stream()]), want, rtol=1e-4, atol=2e-4)


def test_a_weight_is_replaced():
    def run(model):
        with exeunt.attach(model, recipe_of()) as early:
            cache = prefilled(model)
            ids = torch.tensor([[5], [9]], device="cuda")
            with torch.no_grad():
                found = [model(ids, past_key_values=cache).logits for _ in range(4)]
                replace_weight(model)
                found += [model(ids, past_key_values=cache).logits for _ in range(4)]
            return torch.stack(found), early.report()

    model = llama()
    with without():
        want, _ = run(copy.deepcopy(model))
    got, report = run(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert report.graphs["weights replaced: recorded anew"] == 1


def test_detach_gives_the_memory_back():
    model = llama()
    one_run(model, inputs(4), recipe_of())  # libraries' own workspaces
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    one_run(model, inputs(4), recipe_of())
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
