"""Rows in and out of a running batch: any pattern of leaving, any lengths; policies that answer for themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="attach needs transformers")

import exeunt
from encoder_zoo import CLASSES, build, states_of
from exeunt import buckets
from exeunt.classifier_heads import ClassifierHeads, LinearHead, PoolerHead
from exeunt.confidence import measure
from exeunt.policies import Evidence, Halting, Policy, Threshold, Vote
from exeunt.recipes import Recipe
from exeunt.states import Drop

CLOSE = 2e-6


@dataclass(frozen=True)
class Scripted(Policy):
    """Row r leaves at exit ``plan[r]``; which row it is travels in the state."""

    plan: tuple[int, ...]
    needs = frozenset({"label"})

    def start(self, rows, device=None, classes=None):
        return {"row": torch.arange(rows)}

    def step(self, state, seen, at):
        return torch.tensor(self.plan)[state["row"]] == at.exit


MODELS = {name: build(name) for name in ("bert", "deberta-v2", "modernbert")}


def heads_for(seed=3):
    torch.manual_seed(seed)
    return ClassifierHeads({e: LinearHead(32, CLASSES, "mean") for e in range(5)})


HEADS = heads_for()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_pattern_of_leaving(name, plan, cut, seed):
    model = MODELS[name]
    lengths = torch.tensor([n for _, n in plan])
    ids = torch.randint(3, 199, (len(plan), int(lengths.max())), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    states, full = states_of(model, ids, mask)
    with torch.no_grad():
        logits = [*HEADS.logits(states, mask).values(), full.logits]
        recipe = Recipe(tuple(HEADS), None, Scripted(tuple(d for d, _ in plan)), Drop(), HEADS)
        with exeunt.attach(model, recipe, buckets=cut) as early:
            got = model(input_ids=ids, attention_mask=mask).logits
    assert early.report().exit_layers[0].tolist() == [d for d, _ in plan]
    assert early.report().layer_rows == sum(d + 1 for d, _ in plan)
    for row, (depth, _) in enumerate(plan):
        assert float((got[row] - logits[depth][row]).abs().max()) <= CLOSE


@pytest.mark.parametrize("name", list(exeunt.ops.Check.MEASURES))
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_check_in_one_call_decides_as_measure_and_policy_do(monkeypatch, name, pooling):
    torch.manual_seed(5)
    heads = ClassifierHeads({e: PoolerHead(32, CLASSES, pooling, width=16) for e in range(5)})
    ids = torch.randint(3, 199, (20, 30))
    mask = (torch.arange(30) < torch.randint(4, 31, (20, 1))).long()
    seen = []

    def run(threshold):
        recipe = Recipe(tuple(heads), measure(name), Threshold(threshold), Drop(), heads)
        with exeunt.attach(MODELS["bert"], recipe) as early, torch.no_grad():
            logits = MODELS["bert"](input_ids=ids, attention_mask=mask).logits
        return logits, early.report().exit_layers[0]

    def noting(self, state, point, at):
        leave, evidence = look(self, state, point, at)
        seen.append(evidence.score)
        return leave, evidence

    look = Recipe.look
    with monkeypatch.context() as patch:
        patch.setattr(exeunt.ops.Check, "runs_on", staticmethod(lambda weight: False))
        patch.setattr(Recipe, "look", noting)
        run(math.inf)
        scores = seen[0].sort().values
        at = int((scores[1:] - scores[:-1])[5:15].argmax()) + 5  # some leave at the first exit, others don't
        threshold = float(scores[at : at + 2].mean())
        expected = run(threshold)
        assert len(expected[1].unique()) > 1
        seen.clear()
    monkeypatch.setattr(Recipe, "look", lambda *args: pytest.fail("the kernel could tell"))
    got = run(threshold)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])


@given(st.lists(st.integers(1, 512), min_size=1, max_size=70), st.integers(1, 300))
def test_buckets_hold_every_row_once_and_are_worth_it(found, worth):
    lengths = torch.tensor(found)
    parts = buckets.cut(lengths, worth)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(found)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    padded = sum(len(part) * int(lengths[part].max()) for part in parts)
    assert padded <= len(found) * max(found) - worth * (len(parts) - 1)


def test_padding_on_the_left_is_kept():
    model = MODELS["bert"]
    ids = torch.randint(3, 199, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) >= torch.tensor([0, 3, 9, 17, 1, 5])[:, None]).long()
    states, full = states_of(model, ids, mask)
    plan = (0, 2, 5, 5, 3, 5)
    with torch.no_grad(), exeunt.attach(model, Recipe(tuple(HEADS), None, Scripted(plan), Drop(), HEADS)):
        got = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        logits = [*HEADS.logits(states, mask).values(), full.logits]
    for row, depth in enumerate(plan):
        assert float((got[row] - logits[depth][row]).abs().max()) <= CLOSE


@pytest.mark.parametrize("policy", [Threshold(math.inf, fallback="most_confident"), Vote(0.9), Halting()], ids=repr)
def test_policies_that_answer_for_themselves(policy):
    model, confidence = MODELS["bert"], measure("max_prob")
    ids = torch.randint(3, 199, (9, 15), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    states, full = states_of(model, ids, mask)
    with torch.no_grad():
        steps = [*HEADS.logits(states, mask).values(), full.logits]
        with exeunt.attach(model, Recipe(tuple(HEADS), confidence, policy, Drop(), HEADS)):
            got = model(input_ids=ids).logits
    for row in range(9):
        seen, state = [z[row : row + 1] for z in steps], policy.start(1, classes=CLASSES)
        for k, z in enumerate(seen):
            stats = exeunt.ExitStats.from_logits(z)
            evidence = Evidence(stats.max_prob, stats.argmax, stats.max_prob, z)
            at = exeunt.policies.At(k, k, 5)
            if bool(policy.step(state, evidence, at)) or at.last:
                want = policy.answer(state, evidence, at).logits[0]
                break
        assert torch.allclose(got[row], want, atol=CLOSE)
    if isinstance(policy, Threshold):
        surest = torch.stack(steps).softmax(-1).amax(-1).argmax(0)
        assert torch.allclose(got, torch.stack(steps)[surest, torch.arange(9)], atol=CLOSE)


def test_arguments_that_were_not_there_when_the_model_was_watched():
    model = MODELS["bert"]
    ids = torch.randint(3, 199, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([20, 3, 9, 17, 1, 5])[:, None]).long()
    given_ids = torch.arange(20).expand(6, -1) + 7
    plan, inputs = (0, 2, 5, 5, 3, 5), dict(input_ids=ids, attention_mask=mask, position_ids=given_ids)
    with torch.no_grad(), exeunt.attach(model, Recipe(tuple(HEADS), None, Scripted((9,) * 6), Drop(), HEADS)):
        full = model(**inputs).logits
    with torch.no_grad(), exeunt.attach(model, Recipe(tuple(HEADS), None, Scripted(plan), Drop(), HEADS)):
        got = model(**inputs).logits
    for row, depth in enumerate(plan):
        assert depth < 5 or float((got[row] - full[row]).abs().max()) <= CLOSE
