"""Replay against live runs: a recorded encoder, every recipe that applies, row by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="attach needs transformers")

import exeunt
from encoder_zoo import CLASSES, build, rows
from exeunt.classifier_heads import (
    META,
    ClassifierHeads,
    GlobalMaps,
    LinearHead,
    MetaProbe,
    PastFutureHead,
    PastMixHead,
)
from exeunt.evaluation import record
from exeunt.evaluation.encoders import runner
from exeunt.heads import Probe
from exeunt.policies import FixedDepth, Threshold
from exeunt.recipes import Recipe
from exeunt.replay import replay
from exeunt.states import Drop

N = 24


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def setting(request, tmp_path_factory):
    """Model, heads with probes, texts and their recording."""
    model = build(request.param)
    config, g = model.config, torch.Generator().manual_seed(1)
    heads = {}
    for e in range(config.num_hidden_layers - 1):
        heads[e] = LinearHead(config.hidden_size, CLASSES, probe=Probe(config.hidden_size))
        with torch.no_grad():
            heads[e].out.weight.normal_(std=1.5 / config.hidden_size**0.5, generator=g)
            heads[e].probe.weight.normal_(std=0.3, generator=g)
    heads = ClassifierHeads(heads)
    ids, mask, lengths = rows(N)
    texts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    recording = record(
        runner(model, heads), texts, tmp_path_factory.mktemp(request.param), exits=list(heads),
        layers=config.num_hidden_layers, model=model, batch=8, progress=False,
    )  # fmt: skip
    return model, heads, ids, mask, recording


def agreement(**looks):
    return Recipe(None, exeunt.confidence.measure("agreement"), exeunt.policies.Threshold(1.0, **looks), Drop())


RECIPES = {
    "shallow_deep": lambda: exeunt.recipes.shallow_deep(0.7),
    "act": lambda: exeunt.recipes.act(),
    "act on max_prob": lambda: exeunt.recipes.act(0.2, confidence="max_prob"),
    "deebert": lambda: exeunt.recipes.deebert(0.7),
    "right_tool": lambda: exeunt.recipes.right_tool(0.6, temperatures=[1.0, 1.1, 1.2, 1.3, 1.4]),
    "fastbert": lambda: exeunt.recipes.fastbert(0.7),
    "pabee": lambda: exeunt.recipes.pabee(2),
    "elbert": lambda: exeunt.recipes.elbert(0.4, 2, kind="monotone"),
    "ensemble": lambda: exeunt.recipes.ensemble(1.6),
    "leebert": lambda: exeunt.recipes.leebert(1),
    "gpf": lambda: exeunt.recipes.gpf(0.6),
    "berxit": lambda: exeunt.recipes.berxit(0.4),
    "cats": lambda: exeunt.recipes.cats(0.55),
    "beem": lambda: exeunt.recipes.beem(1.5),
    "calm": lambda: Recipe(None, exeunt.confidence.measure("margin"), exeunt.policies.Threshold(0.5), Drop()),
    "fixed": lambda: Recipe(None, None, FixedDepth(3), Drop()),
    "agreement": lambda: agreement(),
    "agreement from the third exit on": lambda: agreement(min_exit=2),
    "agreement at every second exit": lambda: agreement(interval=2),
}


def check(setting, rule, varied=True):
    """Replay and live run agree on where each row leaves, and on what it answers."""
    model, heads, ids, mask, recording = setting
    recipe = dataclasses.replace(rule, exits=tuple(heads), heads=heads)
    told = replay(recording, recipe)
    assert told.exact
    with exeunt.attach(model, recipe) as early, torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(torch.cat(early.report().exit_layers), told.depth)
    assert torch.equal(logits.argmax(1), told.label)
    assert early.report().layer_rows == told.cost.sum()
    assert len(told.depth.unique()) > 1 or not varied


@pytest.mark.parametrize("name", RECIPES)
def test_replay_is_the_live_run(setting, name):
    check(setting, RECIPES[name](), varied=name != "fixed")


def test_replay_of_saturation_is_the_live_run(setting):
    scores = setting[-1].measures["saturation"][:, :-1].flatten().sort().values
    half = len(scores) // 2
    middle = float(scores[half : half + 2].mean())  # between two scores, which random models have close together
    saturation = Recipe(None, exeunt.confidence.measure("saturation"), exeunt.policies.Threshold(middle), Drop())
    check(setting, saturation)


def built_on_earlier(kind, width, layers):
    """Heads at every layer, each of which reads what those before it say."""
    torch.manual_seed(3)
    maps, made = GlobalMaps(width, CLASSES, layers), {}
    for e in range(layers - 1):
        if kind == "past mix":
            made[e] = PastMixHead(width, CLASSES, layers=e + 1, earlier=e)
        elif kind == "past and future":
            made[e] = PastFutureHead(width, CLASSES, layer=e, layers=layers, maps=maps)
        else:
            made[e] = LinearHead(width, CLASSES)
            made[e].meta = MetaProbe(CLASSES, width, history=layers)
    heads = ClassifierHeads(made)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return heads


@pytest.mark.parametrize("kind", ["past mix", "past and future", "meta"])
@pytest.mark.parametrize("policy", ["some exits", "all exits from the second on", "the most confident"])
def test_heads_that_build_on_earlier_ones_run_at_all_of_them(kind, policy, tmp_path):
    model = build("bert")
    layers = model.config.num_hidden_layers
    heads = built_on_earlier(kind, model.config.hidden_size, layers)
    ids, mask, lengths = rows(N)
    texts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    recording = record(
        runner(model, heads), texts, tmp_path, exits=list(heads), layers=layers, model=model, progress=False
    )
    measure = META if kind == "meta" else exeunt.confidence.measure("max_prob")
    exits = (1, 3, 4) if policy == "some exits" else tuple(heads)
    scores = recording.scores(measure, recording.columns(exits))[:-1].flatten().sort().values
    half = int(0.7 * len(scores))
    value = float(scores[half : half + 2].mean())
    more = {
        "some exits": {},
        "all exits from the second on": {"min_exit": 1},
        "the most confident": {"fallback": "most_confident"},
    }[policy]
    recipe = Recipe(exits, measure, Threshold(value, **more), Drop(), heads)
    told = replay(recording, recipe)
    with exeunt.attach(model, recipe) as early, torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask).logits
    assert told.exact and len(told.depth.unique()) > 1
    assert torch.equal(torch.cat(early.report().exit_layers), told.depth)
    assert torch.equal(out.argmax(1), told.label)


def test_a_meta_probe_is_in_the_way_of_no_other_measure(tmp_path):
    model = build("bert")
    heads = built_on_earlier("meta", model.config.hidden_size, model.config.num_hidden_layers)
    for e in heads:
        heads[e].probe = Probe(model.config.hidden_size)
        torch.nn.init.normal_(heads[e].probe.weight, std=0.3)
    ids, mask, lengths = rows(N)
    texts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    recording = record(runner(model, heads), texts, tmp_path, exits=list(heads), layers=6, progress=False)
    assert set(recording.measures) == {"saturation", "probe", "meta"}
    check((model, heads, ids, mask, recording), exeunt.recipes.berxit(0.4))


def test_recording_belongs_to_its_model(setting, tmp_path):
    *_, recording = setting
    assert recording.about["model"]["hidden_size"] == 32 and set(recording.measures) == {"probe", "saturation"}
