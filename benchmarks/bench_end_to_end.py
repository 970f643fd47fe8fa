"""Decoding with exits beside the model alone and beside a peer: `pytest benchmarks/bench_end_to_end.py`.

Every case runs its sides in turns within one process, on the same weights, and reports the median of the ratios of
neighbouring runs, so that a busy machine slows both. The model is a random Llama of 16 layers: forced exits need no
training. `python benchmarks/table.py FILE` turns a `--benchmark-json=FILE` into a table. On a machine that others use
too, `OMP_NUM_THREADS=1 BENCH_CLOCK=process_time` counts the seconds that the process itself ran.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import exeunt
from exeunt.confidence import Confidence
from exeunt.states import Propagate

LAYERS, ROUNDS, PROMPT = 16, 15, 16
CLOCK = getattr(time, os.environ.get("BENCH_CLOCK", "perf_counter"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FREE = Confidence("free", 0.0, 1.0, False, lambda point: point.hidden.new_zeros(len(point.hidden)))  # costs no check


@pytest.fixture(scope="module")
def models():
    """The model and a twin on the same weights, of one dtype at a time."""
    kept = {}

    def make(dtype):
        if dtype not in kept:
            kept.clear()
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS,
                num_attention_heads=16, num_key_value_heads=8, eos_token_id=None,
            )  # fmt: skip
            model = LlamaForCausalLM(config).eval().to(DTYPES[dtype])
            kept[dtype] = model, copy.deepcopy(model, {id(p): p for p in model.parameters()})
        return kept[dtype]

    return make


def filled_cache(model, batch, length):
    """A cache as a prompt of that length leaves it; what is in it does not matter for time."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = batch, config.num_key_value_heads, length, config.head_dim
    for layer in range(LAYERS):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)
    return cache


def decoding(model, batch, length=PROMPT, tokens=1):
    """A function that decodes so many more tokens."""
    cache, ids = filled_cache(model, batch, length), torch.full((batch, 1), 7)

    def step():
        with torch.inference_mode():
            for _ in range(tokens):
                model(input_ids=ids, past_key_values=cache)

    return step


def compare(benchmark, group, sides, rounds=ROUNDS, expected=None, tokens=1):
    """Run the sides in turns; note medians in ms a token and the second side's speed as a multiple of the first's.

    ``expected`` is what that speed could be at most; a third side stands for it.
    """
    names, seconds = list(sides), {name: [] for name in sides}

    def one_round():
        for name in names:
            start = CLOCK()
            sides[name]()
            seconds[name].append(CLOCK() - start)
        names.reverse()  # neither side always runs on the caches that the other has left

    benchmark.group = group
    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1, iterations=1)
    first, *others = (times[1:] for times in seconds.values())
    speed, *rest = (statistics.median(a / b for a, b in zip(first, other, strict=True)) for other in others)
    expected = rest[0] if rest else expected
    benchmark.extra_info.update(
        case=group, threads=torch.get_num_threads(), clock=CLOCK.__name__, speed=speed, expected=expected,
        sides={name: statistics.median(times[1:]) * 1e3 / tokens for name, times in seconds.items()},
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_never_exits(benchmark, models, dtype, batch):
    """Overhead of being attached: what a check costs is another question, answered by bench_exit_stats.py."""
    model, twin = models(dtype)
    with exeunt.attach(twin, exeunt.recipes.calm([7, 11], math.inf, confidence=FREE)):
        sides = {"stock": decoding(model, batch), "exeunt": decoding(twin, batch)}
        compare(benchmark, f"never exits, {dtype}, B={batch}", sides)


def other_family(name):
    """A random model of another family with the same number of layers and hidden size."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=32000, n_embd=1024, n_layer=LAYERS, n_head=16, eos_token_id=None)
        return GPT2LMHeadModel(config).eval()
    config = T5Config(
        vocab_size=32000, d_model=1024, d_kv=64, d_ff=2816, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=16,
        eos_token_id=None, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families_never_exit(benchmark, family, batch):
    """The same overhead where layers take other arguments and return tuples (GPT-2), and beside an encoder (T5)."""
    model = other_family(family)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    prompt, ids = torch.full((batch, PROMPT), 5), torch.full((batch, 1), 7)
    encoder = {"encoder_outputs": model.encoder(input_ids=prompt)} if family == "t5" else {}
    name = "decoder_input_ids" if encoder else "input_ids"

    def steps(side):
        with torch.inference_mode():
            cache = side(**{name: prompt}, **encoder, use_cache=True).past_key_values

        def step():
            with torch.inference_mode():
                side(**{name: ids}, **encoder, past_key_values=cache)

        return step

    with exeunt.attach(twin, exeunt.recipes.calm([7, 11], math.inf, confidence=FREE)):
        compare(benchmark, f"never exits, {family}, fp32, B={batch}", {"stock": steps(model), "exeunt": steps(twin)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_cache(benchmark, models, dtype):
    """The growing cache beside concatenation, nothing leaving."""
    model, twin = models(dtype)
    with exeunt.attach(twin, exeunt.recipes.calm([7], math.inf, confidence=FREE)):
        sides = {"stock": decoding(model, 1, 2048), "exeunt": decoding(twin, 1, 2048)}
        compare(benchmark, f"never exits, {dtype}, B=1, S=2048", sides)


def bytes_saved(model, layers, lazy):
    """Bytes of weights read at full depth over those read if all rows leave: with check and fill-in, one read each."""
    layer = model.model.layers[0]
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in (("layer", layer), ("head", model.lm_head))}
    fill = sum(p.numel() for m in (layer.self_attn.k_proj, layer.self_attn.v_proj) for p in m.parameters())
    fill *= (LAYERS - layers) / (Propagate().limit + 1 if lazy else 1)
    return (LAYERS * size["layer"] + size["head"]) / (layers * size["layer"] + size["head"] + fill)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("layers", [8, 4])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_exit(benchmark, models, dtype, batch, layers, lazy):
    """Forced exits: every row passes the softmax margin's check after ``layers`` layers."""
    model, twin = models(dtype)
    recipe = exeunt.recipes.calm([layers - 1], 0.0, lazy=lazy)
    tokens = Propagate().limit + 1 if lazy else 1  # as many as wait for one another: each run fills in once
    with exeunt.attach(twin, recipe):
        sides = {"stock": decoding(model, batch, tokens=tokens), "exeunt": decoding(twin, batch, tokens=tokens)}
        name = f"all leave after {layers} of {LAYERS}, {'lazy' if lazy else 'eager'}, {dtype}, B={batch}"
        compare(benchmark, name, sides, 3 if lazy else ROUNDS, bytes_saved(model, layers, lazy), tokens)


def small_steps(layers, skip):
    """Times decoding steps of a tiny model; ``skip`` says how the layers after its second are passed by."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    skip(model)

    def steps():
        with torch.inference_mode():
            cache = model(input_ids=torch.full((1, PROMPT), 7), use_cache=True).past_key_values
            start = CLOCK()
            for _ in range(Propagate().limit):
                model(input_ids=torch.full((1, 1), 7), past_key_values=cache)
            return CLOCK() - start

    return steps


def test_layers_that_nobody_runs(benchmark):
    """What a stock layer costs once all rows have left: a step of 67 layers less one of 3, in microseconds a layer.

    Beside it the same of layers that hand their input on at once: the loop of the stock model alone.
    """

    def leave(model):
        exeunt.attach(model, exeunt.recipes.calm([1], 0.0, confidence=FREE, lazy=True))

    def pass_by(model):
        for layer in model.model.layers[2:]:
            layer.forward = lambda hidden, *args, **kwargs: hidden

    sides = {(name, layers): small_steps(layers, skip)
             for name, skip in (("loop alone", pass_by), ("exeunt", leave)) for layers in (3, 67)}  # fmt: skip
    seconds = {side: [] for side in sides}

    def one_round():
        for side, steps in sides.items():
            seconds[side].append(steps())

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1, iterations=1)
    for name in ("loop alone", "exeunt"):
        more = [b - a for a, b in zip(seconds[name, 3], seconds[name, 67], strict=True)]
        benchmark.extra_info[name] = statistics.median(more) / Propagate().limit / 64 * 1e6
    benchmark.extra_info["layer"] = "microseconds of a layer that nobody runs"


@pytest.mark.parametrize("confidence", ["margin", "saturation"])
@pytest.mark.parametrize("layers", [8, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_beside_economize(benchmark, models, batch, layers, confidence):
    """The same exits with the same measure by economize's CALM (PyPI), under generate.

    What is possible is the stock model cut to the layers that run, which neither checks nor fills in anything.
    """
    economize = pytest.importorskip("economize", reason="the peer: pip install economize")
    from economize.techniques.dynamic_depth import CalmConfig

    model, twin = models("bf16")
    measure, lowest = {"margin": ("softmax", 0.0), "saturation": ("state", 0.0)}[confidence]
    peer_model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    peer = economize.apply(peer_model, CalmConfig(confidence=measure, threshold=lowest, min_layer=layers))
    cut = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    cut.model.layers, cut.config.num_hidden_layers = cut.model.layers[:layers], layers
    prompt = torch.arange(3, 3 + 4 * batch).view(batch, 4)
    settings = dict(max_new_tokens=40, do_sample=False)
    ran = []
    peer_layers = peer_model.model.layers
    handles = [layer.mlp.register_forward_pre_hook(lambda m, x: ran.append(x[0].shape[1])) for layer in peer_layers]
    with exeunt.attach(twin, exeunt.recipes.calm([layers - 1], lowest, confidence=confidence, lazy=True)):
        sides = {
            "economize": lambda: peer.generate(prompt, **settings),
            "exeunt": lambda: twin.generate(prompt, **settings),
            "cut model": lambda: cut.generate(prompt, **settings),
        }
        sides["economize"]()
        steps = sum(n == 1 for n in ran)
        for handle in handles:
            handle.remove()
        assert layers <= steps / 39 < layers + 1, f"expected the peer to run {layers} layers a step, got {steps / 39}"
        name = f"under generate, {confidence}, exit after {layers} of {LAYERS}, bf16, B={batch}"
        compare(benchmark, name, sides, 5, tokens=40)
