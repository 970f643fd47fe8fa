"""Every family: bit-identical while nothing leaves, equal to the oracle that runs everything, rows really skipped."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers models")
import exeunt
from exeunt import models
from exeunt.states import Defer

sys.path.insert(0, os.path.dirname(__file__))
import zoo

EXITS = [0, 1, 3]


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def family(request):
    return zoo.make(request.param)


def stack_of(model):
    """The decoder's layers, found by their number."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    found = [m for name, m in lists if len(m) == zoo.LAYERS and "encoder" not in name.split(".")]
    assert len(found) == 1
    return found[0]


class Executed:
    """Rows that get through each layer in single-token forwards, counted at the last part of the layer to run."""

    def __init__(self, model):
        self.rows, self.layers, self.handles = [0] * zoo.LAYERS, stack_of(model), []
        order = []
        for child in self.layers[0].modules():
            self.handles.append(child.register_forward_hook(lambda m, *_: order.append(m)))
        zoo.generate(model, zoo.inputs(model, batch=1), new=1)
        self.close()
        inner = [m for m in order if m is not self.layers[0] and not isinstance(m, torch.nn.Dropout)]
        last = next(name for name, m in self.layers[0].named_modules() if m is inner[-1])
        for i, layer in enumerate(self.layers):
            part = layer.get_submodule(last)
            self.handles.append(part.register_forward_hook(lambda m, a, out, i=i: self.note(i, a[0])))

    def note(self, i, x):
        count = x.shape[0] * (x.shape[1] if x.dim() == 3 else 1)
        if count <= zoo.BATCH:
            self.rows[i] += count

    def close(self):
        while self.handles:
            self.handles.pop().remove()


class Oracle:
    """All layers run for all rows; what a row gets after its exit is thrown away. The cache is transformers' own.

    ``full``: skipped layers see what they would see without exits; otherwise they see the state of the exit.
    Exit logits come from the model's own forward with its decoder taken out, so scaling, bounds and biases are its own.
    """

    def __init__(self, model, threshold, full=False):
        self.model, self.threshold, self.full = model, threshold, full
        self.structure = models.discover(model)
        self.depths, self.scores = [], []

    def logits(self, hidden):
        """[n, V] of [n, 1, D] after the decoder's own tail."""
        normed = self.structure.normalise(hidden)
        decoder, config = self.structure.decoder, self.model.config

        class Out(dict):
            def __getattr__(self, name):
                return normed if name == "last_hidden_state" else None

            def __getitem__(self, key):
                return normed if key in (0, "last_hidden_state") else None

        ids = torch.zeros(len(hidden), 1, dtype=torch.long)
        outer = next(m for m in self.model.modules() if m is decoder)
        head, outer.forward = self.model.get_output_embeddings(), lambda *a, **k: Out()
        patched = vars(head).pop("forward")
        try:
            if config.is_encoder_decoder:
                from transformers.modeling_outputs import BaseModelOutput

                encoded = BaseModelOutput(last_hidden_state=torch.zeros(len(hidden), 2, zoo.WIDTH))
                return self.model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[:, 0]
            return self.model(input_ids=ids, use_cache=False).logits[:, 0]
        finally:
            del outer.forward
            head.forward = patched

    def __enter__(self):
        for i, layer in enumerate(self.structure.layers):
            layer.forward = functools.partial(self.layer, i, layer)
        head = self.structure.head
        head.forward = functools.partial(self.head, head)
        return self

    def __exit__(self, *exc):
        for module in (*self.structure.layers, self.structure.head):
            del module.forward

    def layer(self, i, layer, hidden, *args, **kwargs):
        if i == 0:
            cache = next(
                (kwargs[k] for k in ("cache", "past_key_values", "layer_past") if kwargs.get(k) is not None), None
            )
            cache = cache if cache is not None else next((a for a in args if hasattr(a, "get_seq_length")), None)
            decoding = cache is not None and hidden.shape[1] == 1 and cache.get_seq_length() > 0
            self.depth = torch.full((len(hidden),), zoo.LAYERS - 1) if decoding else None
            self.kept = hidden
        out = type(layer).forward(layer, hidden, *args, **kwargs)
        if self.depth is None:
            return out
        ran = out[0] if isinstance(out, tuple) else out
        new = self.kept = torch.where((self.depth < i)[:, None, None], self.kept, ran)
        if i in EXITS:
            top = self.logits(new).double().softmax(-1).topk(2, -1).values
            score = top[:, 0] - top[:, 1]
            alive = self.depth >= i
            self.scores += score[alive].tolist()
            self.depth[alive & (score >= self.threshold)] = i
        after = ran if self.full and i < zoo.LAYERS - 1 else new
        return (after, *out[1:]) if isinstance(out, tuple) else after

    def head(self, head, normed):
        if self.depth is not None:
            self.depths.append(self.depth)
        return type(head).forward(head, normed)


def oracle_run(model, full=False):
    """Tokens and depths of a threshold that no score comes close to and that lets rows out at several depths."""
    for seed in range(1, 5):
        given = zoo.inputs(model, seed=seed)
        with Oracle(model, math.inf, full) as free:
            zoo.generate(model, given)
        scores = torch.tensor(free.scores)
        for share in (0.7, 0.6, 0.8, 0.5, 0.9):
            threshold = float(scores.quantile(share))
            with Oracle(model, threshold, full) as oracle:
                out = zoo.generate(model, given)
            closest = min(abs(s - threshold) for s in oracle.scores)
            if closest > 2e-4 and len(set(torch.stack(oracle.depths).flatten().tolist())) > 2:
                return given, threshold, out, torch.stack(oracle.depths)
    raise AssertionError("no threshold is far from all scores")


def test_bit_identical_while_nothing_leaves(family):
    given = zoo.inputs(family)
    plain = zoo.generate(family, given)
    with exeunt.attach(family, exeunt.recipes.calm(EXITS, math.inf)) as early:
        got = zoo.generate(family, given)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
    assert early.report().steps == 11 and early.report().layer_rows == early.report().full_layer_rows == 11 * 3 * 5
    again = zoo.generate(family, given)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


def test_propagate_equals_the_oracle_that_runs_everything(family):
    given, threshold, expected, depths = oracle_run(family)
    prompt = zoo.BATCH if family.config.is_encoder_decoder else 0  # one token long, at full depth
    for lazy in (False, True):
        with exeunt.attach(family, exeunt.recipes.calm(EXITS, threshold, lazy=lazy)) as early:
            counted = Executed(family)
            early.reset_report()
            got = zoo.generate(family, given)
            counted.close()
        assert torch.equal(torch.stack(early.report().exit_layers), depths)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-3, atol=2e-3)
        assert early.report().layer_rows == int((depths + 1).sum()) < early.report().full_layer_rows
        assert counted.rows == [prompt + int((depths >= i).sum()) for i in range(zoo.LAYERS)]


def test_defer_gives_the_keys_and_values_of_full_depth(family):
    given, threshold, expected, depths = oracle_run(family, full=True)
    for state in (Defer(), Defer(limit=2)):
        recipe = dataclasses.replace(exeunt.recipes.calm(EXITS, threshold), state=state)
        with exeunt.attach(family, recipe) as early:
            got = zoo.generate(family, given)
        report = early.report()
        assert torch.equal(torch.stack(report.exit_layers), depths)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-3, atol=2e-3)
        assert report.late_rows > 0 and report.layer_rows == int((depths + 1).sum()) + report.late_rows


WAYS = {
    "beams": dict(num_beams=2),
    "sampled": dict(do_sample=True, top_k=20),
    "eager attention": {},
    "bfloat16": {},
}


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_bit_identical_under_other_ways_to_generate(name, way):
    options = dict(attn_implementation="eager") if way == "eager attention" else {}
    model = zoo.make(name, **options).to(torch.bfloat16 if way == "bfloat16" else torch.float32)
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in zoo.inputs(model).items()}
    plain = zoo.generate(model, given, new=6, **WAYS[way])
    with exeunt.attach(model, exeunt.recipes.calm(EXITS, math.inf)) as early:
        got = zoo.generate(model, given, new=6, **WAYS[way])
    assert torch.equal(got.sequences, plain.sequences) and early.report().steps == 5
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))
