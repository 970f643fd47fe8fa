"""Calibrations on disk and on a model: whole or absent, and only where they belong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from datetime import datetime, timezone

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="a calibration belongs to a model")
import exeunt
from exeunt.calibration import Calibration, Contract, fingerprints
from exeunt.classifier_heads import ClassifierHeads, PastMixHead
from exeunt.heads import ExitHead, ExitHeads, Probe, Translator
from oracle import prompts, tiny_llama

CONTRACT = Contract("token disagreement", 0.1, 0.95, 200, "learn_then_test, hoeffding_bentkus", "prompt")
EXITS = [1, 2]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def recipe(**changes):
    return exeunt.recipes.calm(**{"exits": EXITS, "confidence": "max_prob"} | changes)


def calibration(model, thresholds=0.3, rec=None):
    return Calibration.of(model, rec or recipe(), thresholds, CONTRACT, ["one", "two"])


def test_what_is_saved_is_loaded(model, tmp_path):
    path = tmp_path / "c.json"
    made = calibration(model, {1: math.inf, 2: float(np.nextafter(np.float32(0.7), np.float32(1)))})
    made.save(path)
    assert Calibration.load(path) == made
    assert list(tmp_path.iterdir()) == [path]
    content = json.loads(path.read_text())
    assert content["thresholds"]["1"] is None and content["contract"]["confidence"] == 0.95
    assert "independent draws" in content["contract"]["assumptions"]
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(content["created"])).total_seconds()) < 60


def test_an_interrupted_save_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    calibration(model).save(path)
    before = path.read_bytes()

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        calibration(model, 0.9).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_calibrated_threshold_decides(model, tmp_path):
    """Generation with a calibration equals generation with its threshold, whatever the recipe says."""
    path, inputs = tmp_path / "c.json", prompts()
    calibration(model, 0.05).save(path)

    def run(rec, **kw):
        with exeunt.attach(model, rec, **kw) as early:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return out, early

    out, early = run(recipe(threshold=0.999), calibration=path)
    expected, plain = run(recipe(threshold=0.05))
    assert torch.equal(out, expected) and early.report().histogram == plain.report().histogram
    assert set(early.report().histogram) & set(EXITS)
    assert early.calibration == Calibration.load(path) and plain.calibration is None
    _, early = run(recipe(threshold=0.999), calibration=calibration(model, 0.05))
    assert early.recipe.policy.value == 0.05


@pytest.mark.parametrize("value,applied", [(math.inf, math.inf), (1.0000001, math.inf), (-3.4e38, 0.0), (0.25, 0.25)])
def test_thresholds_beyond_the_measure_never_or_always_exit(model, value, applied):
    assert calibration(model, value).apply(model, recipe()).policy.value == applied


def test_decay_stays_that_of_the_recipe(model):
    rec = recipe(decay=4.0, length=20)
    assert calibration(model, 0.4, rec).apply(model, rec).policy == exeunt.policies.Threshold(0.4, rec.policy.decay)


def heads(seed):
    torch.manual_seed(seed)
    made = ExitHeads({e: ExitHead(Translator(32), Probe(32)) for e in EXITS})
    torch.nn.init.normal_(made[1].probe.weight)
    return made


def test_a_calibration_of_something_else_is_refused(model, tmp_path):
    path = tmp_path / "c.json"
    calibration(model).save(path)
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    for other, rec, message in (
        (tuned, recipe(), "another model: expected weights [0-9a-f]{64}, got [0-9a-f]{64}$"),
        (tiny_llama().bfloat16(), recipe(), "another model: expected dtype torch.float32, got torch.bfloat16; weights"),
        (model, recipe(exits=[1]), r"another recipe: expected exits \[1, 2\], got \[1\]$"),
        (model, recipe(confidence="margin"), "another recipe: expected confidence max_prob, got margin$"),
        (model, recipe(decay=4.0), r"another recipe: expected decay None, got \[4.0, None\]$"),
        (model, recipe(heads=heads(0)), "another exit heads: expected digest None, got [0-9a-f]{64}$"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            exeunt.attach(other, rec, calibration=path)
        assert "\n" not in str(caught.value)
        exeunt.attach(other, rec).detach()  # nothing was left behind
    with_heads = calibration(model, rec=recipe(heads=heads(0)))
    with_heads.apply(model, recipe(heads=heads(0)))
    with pytest.raises(ValueError, match="another exit heads"):
        with_heads.apply(model, recipe(heads=heads(1)))
    same_weights = heads(0)
    same_weights[1].probe.eps = 0.1
    with pytest.raises(ValueError, match="another exit heads"):
        with_heads.apply(model, recipe(heads=same_weights))


def test_temperatures_are_a_part_of_the_recipe(model):
    warm, warmer = (exeunt.recipes.right_tool(temperatures=[1.5, t], exits=EXITS) for t in (1.2, 1.3))
    made = calibration(model, 0.7, warm)
    assert made.apply(model, warm).policy.value == 0.7
    for other, got in ((warmer, "max_prob at 1.5, 1.3"), (exeunt.recipes.right_tool(exits=EXITS), "max_prob")):
        with pytest.raises(
            ValueError, match=rf"another recipe: expected confidence max_prob at 1\.5, 1\.2, got {got}$"
        ):
            made.apply(model, other)


def test_heads_are_known_by_all_that_decides():
    def mixed(pooling="first", temperature=1.0, layer=1):
        torch.manual_seed(0)
        made = ClassifierHeads({layer: PastMixHead(8, 2, pooling, layers=2, earlier=0)})
        made[layer].temperature.fill_(temperature)
        return fingerprints.of_heads(made)

    assert mixed() == mixed()
    assert len({mixed(), mixed(pooling="mean"), mixed(temperature=2.0), mixed(layer=2)}) == 4
    plain, careful = (ExitHeads({1: ExitHead(probe=Probe(8, eps=eps))}) for eps in (1e-6, 1e-5))
    assert fingerprints.of_heads(plain) != fingerprints.of_heads(careful)
    plain.metadata["note"] = "of no consequence"
    plain.train()
    assert fingerprints.of_heads(plain) == fingerprints.of_heads(ExitHeads({1: ExitHead(probe=Probe(8))}).eval())
    norm, shifted = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    shifted.running_mean += 1
    assert fingerprints.of_weights(norm) != fingerprints.of_weights(shifted), "a buffer decides as well"


def test_each_exit_gets_its_own_threshold(model):
    made = calibration(model, np.array([0.5, 0.75], dtype=np.float32))
    assert made.thresholds == {1: 0.5, 2: 0.75}
    assert made.apply(model, recipe()).policy.value == (0.5, 0.75)
    with exeunt.attach(model, recipe(), calibration=made) as early:
        assert early.recipe.policy == exeunt.policies.Threshold((0.5, 0.75))


@pytest.mark.parametrize("thresholds", [[0.5], {1: 0.5}, {1: 0.5, 3: 0.5}, math.nan])
def test_thresholds_must_fit_the_exits(model, thresholds):
    with pytest.raises(ValueError, match=r"thresholds must be a number for each exit of \[1, 2\], got "):
        calibration(model, thresholds)


def test_files_that_are_no_calibration(model, tmp_path):
    path = tmp_path / "c.json"
    for content in ("", "not json", "[]", '{"format": "exeunt.calibration", "version": 1}', '{"thresholds": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"c\.json is not an exeunt calibration of version 2$"):
            Calibration.load(path)
    calibration(model).save(path)
    whole = json.loads(path.read_text())
    for part in ("contract", "thresholds", "model"):
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != part}))
        with pytest.raises(ValueError, match=f"c.json is a damaged exeunt calibration: '{part}'"):
            Calibration.load(path)
    path.write_text(json.dumps(whole | {"contract": whole["contract"] | {"level": 7}}))
    with pytest.raises(
        ValueError, match="is a damaged exeunt calibration: level must lie strictly between 0 and 1, got 7"
    ):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "missing.json")


def test_fingerprints(model):
    same, other = tiny_llama(), tiny_llama()
    assert fingerprints.of_model(model) == fingerprints.of_model(same)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-6
    assert fingerprints.of_model(model) != fingerprints.of_model(other)
    assert fingerprints.of_weights(torch.nn.Module()) != fingerprints.of_weights(torch.nn.Linear(1, 1))
    ids = [5, 6, 7]
    assert fingerprints.of_data([ids]) == fingerprints.of_data([torch.tensor(ids)]) != fingerprints.of_data([[5, 6]])
    fingerprints.refuse_overlap(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="apart from training data, got 2 of 3 units in both, the first at 1"):
        fingerprints.refuse_overlap(["a", "b", "c"], iter(["c", "b"]))


def test_the_data_is_part_of_it(model):
    assert calibration(model).data != Calibration.of(model, recipe(), 0.3, CONTRACT, ["one"]).data
    first, second = (dataclasses.replace(calibration(model), created="") for _ in range(2))
    assert first == second
