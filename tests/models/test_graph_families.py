"""Steps in graphs, emulated on the CPU, on every stock decoder: what they give without, or the reason why not."""

from __future__ import annotations

import os
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="models are transformers models")

import exeunt
import graphs_on_cpu
from exeunt.models import discover, trial_forward

sys.path.insert(0, os.path.dirname(__file__))
import zoo

#: Families whose steps stay eager, by a word of the reason; all others are to be replayed.
EAGER = {
    "falcon, rope": "host", "falcon, alibi": "alibi", "bloom": "alibi", "mpt": "position_bias",
    **{name: "encoder-decoder" for name in ("t5", "t5 1.1", "mt5", "bart", "marian", "whisper, decoder")},
}  # fmt: skip
WINDOWS = {"mistral, sliding window", "gemma2", "gemma3, text", "cohere2"}


def hands_on(model):
    """Whether the decoder's layers return more than their output, as some do with eager attention."""
    outs = []
    handle = discover(model).layers[0].register_forward_hook(lambda module, args, out: outs.append(out))
    trial_forward(model, 1, 2)
    handle.remove()
    return isinstance(outs[0], tuple) and any(part is not None for part in outs[0][1:])


def made(name, attention):
    exeunt.register_attention()
    try:
        return zoo.make(name, attn_implementation=attention)
    except (KeyError, ValueError):
        pytest.skip(f"{name} has no {attention} attention on this version")


@pytest.mark.parametrize("attention", ["exeunt", "sdpa", "eager"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_what_graphs_give(name, attention, monkeypatch):
    model = made(name, attention)
    given, runs, weights = zoo.inputs(model), [], hands_on(model)
    for on in (False, True):
        if on:
            graphs_on_cpu.on(monkeypatch)
        with exeunt.attach(model, exeunt.recipes.calm([0, 2], 0.5, confidence="margin")) as early:
            out = zoo.generate(model, given)
        runs.append((out.sequences, torch.cat(early.report().exit_layers), torch.stack(out.logits)))
    (tokens, depths, logits), (want_tokens, want_depths, want_logits) = runs[::-1]
    assert torch.equal(tokens, want_tokens) and torch.equal(depths, want_depths)
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=5e-4)
    counts = early.report().graphs
    reasons = [what for what in counts if what.startswith("eager")]
    expected = ([EAGER[name]] if name in EAGER else []) + (["more than their output"] if weights else [])
    if "cache_position" in early.structure.batched:  # transformers before 5.4
        expected.append("cache_position")
    if expected:  # the first that is noticed
        assert len(reasons) == 1 and any(word in reasons[0] for word in expected)
    elif name in WINDOWS and attention != "exeunt":
        assert reasons == ["eager steps: a sliding window without exeunt's attention"]
    else:
        assert not reasons and counts["replayed"] > 10
