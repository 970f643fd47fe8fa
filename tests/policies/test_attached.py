"""Policies with a memory on a language model: every token starts afresh, and rows take their state along."""

from __future__ import annotations

import pytest
import torch

import exeunt
from exeunt.policies import Accumulate, FirstOf, FixedDepth, Halting, Oracle, Patience, Threshold, Vote, Window

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def recipe(policy, confidence="max_prob"):
    measure = None if confidence is None else exeunt.confidence.measure(confidence)
    return exeunt.recipes.Recipe((0, 1, 2, 3, 4), measure, policy, exeunt.states.Propagate())


def generate(model, ids, rec):
    with exeunt.attach(model, rec) as early:
        out = model.generate(ids, max_new_tokens=10, do_sample=False)
    return out, torch.stack(early.report().exit_layers, 1), early.report()


@pytest.mark.parametrize(
    "rec",
    [
        recipe(Patience(1), None),
        recipe(Threshold(1.0), "agreement"),
        recipe(FirstOf((Threshold(0.02, interval=2), Patience(2)))),
        recipe(Accumulate(0.07)),
        recipe(Window(2, "monotone")),
    ],
    ids=lambda r: repr(r.policy),
)
def test_rows_leave_as_they_would_alone(model, rec):
    ids = torch.randint(61, (4, 5), generator=torch.Generator().manual_seed(1))
    out, depths, _ = generate(model, ids, rec)
    for i in range(len(ids)):
        alone, depth, _ = generate(model, ids[i : i + 1], rec)
        assert torch.equal(out[i], alone[0]) and torch.equal(depths[i], depth[0])


def test_patience_and_agreement_are_one_rule(model):
    ids = torch.randint(61, (4, 5), generator=torch.Generator().manual_seed(2))
    one, other = recipe(Patience(1), None), recipe(Threshold(1.0), "agreement")
    assert torch.equal(generate(model, ids, one)[1], generate(model, ids, other)[1])
    assert len(generate(model, ids, one)[1].unique()) > 2


def test_a_fixed_depth_reads_the_head_once_a_token(model):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    _, depths, report = generate(model, ids, recipe(FixedDepth(2), None))
    assert (depths == 2).all() and report.head_reads == report.steps and report.checks == 0


def test_exits_that_are_not_looked_at_cost_nothing(model):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    _, depths, report = generate(model, ids, recipe(Threshold(0.0, min_exit=3)))
    assert (depths == 3).all() and report.checks == report.steps


@pytest.mark.parametrize("policy", [Vote(1.0), Halting(), Oracle(), Threshold(0.5, fallback="most_confident")])
def test_rules_with_answers_of_their_own_are_for_classifiers(model, policy):
    with pytest.raises(ValueError, match=rf"take their exit's own logits, got {type(policy).__name__}"):
        exeunt.attach(model, recipe(policy))


def test_a_strategy_for_encoders_is_refused(model):
    drop = exeunt.recipes.Recipe((1, 2), None, Patience(1), exeunt.states.Drop())
    with pytest.raises(ValueError, match=r"language model's skipped layers, got Drop\(\)"):
        exeunt.attach(model, drop)
