"""A decoding step of an attached Llama on a GPU, exits forced half way: eager, in graphs, and full depth beside it.

    python benchmarks/bench_cuda_attach.py [--out FILE]    on a GPU; the table is appended to FILE

A Llama of random weights (32 layers, D=4096, 16 GB in bfloat16), 512 tokens in its cache, batches of 1 and 8. Every row
leaves after 16 layers: CALM's check reads the head and lets all pass, and the other layers' keys and values come from
the exit state. Full depth is the stock model, as it is and under torch.compile's CUDA graphs with a static cache. What
the bytes allow is full depth's weights, keys and values over those that a step with exits reads; the goal is 0.85 of
it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import exeunt
from bench_cuda_step import milliseconds

LENGTH, STEPS, GOAL = 512, 20, 0.85
SIZES = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128_256, tie_word_embeddings=False,
)  # fmt: skip


def make(device: str, dtype: torch.dtype, attention: str, **sizes: int) -> LlamaForCausalLM:
    config = LlamaConfig(**{**SIZES, **sizes}, eos_token_id=None, attn_implementation=attention)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def read(model: LlamaForCausalLM, batch: int, length: int, run: int) -> int:
    """Bytes that a step reads in which ``run`` layers run and the others get their keys and values filled in."""
    layers = model.model.layers

    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    attention = layers[0].self_attn
    keys = attention.k_proj.weight
    seen = 2 * batch * keys.shape[0] * length * keys.element_size()
    skipped = size(attention.k_proj, attention.v_proj)
    return size(model.lm_head) + run * (size(layers[0]) + seen) + (len(layers) - run) * skipped


def stepping(model, cache, batch: int, length: int = LENGTH, forward=None) -> Callable[[], torch.Tensor]:
    """A step on a cache that holds a prompt; each call decodes one more token."""
    device = model.lm_head.weight.device
    with torch.no_grad():
        model(torch.ones(batch, length, dtype=torch.int64, device=device), past_key_values=cache, logits_to_keep=1)
    ids = torch.full((batch, 1), 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return (forward or model)(ids, past_key_values=cache).logits

    return step


def attached(model, batch: int, graphs: bool, length: int = LENGTH) -> contextlib.AbstractContextManager:
    """A step with exits, and its report."""

    @contextlib.contextmanager
    def entered() -> Iterator[tuple[Callable[[], torch.Tensor], Callable[[], exeunt.report.Report]]]:
        half = len(model.model.layers) // 2
        off = contextlib.nullcontext() if graphs else mock.patch("exeunt.graphs.recorder_for", lambda device: None)
        recipe = exeunt.recipes.calm(exits=[half - 1], threshold=0.0, confidence="margin")
        with off, exeunt.attach(model, recipe) as early:
            yield stepping(model, DynamicCache(), batch, length), early.report

    return entered()


def table() -> Iterator[str]:
    yield "## attach on a GPU: all rows leave after 16 of 32 layers"
    yield ""
    yield ("| batch | stock eager ms | stock, torch.compile's graphs ms | exits eager ms | exits in graphs ms | "
           f"gain over compiled | bytes allow | of that (goal {GOAL}) |")  # fmt: skip
    yield "|---" * 8 + "|"
    model = make("cuda", torch.bfloat16, exeunt.register_attention())
    for batch in (1, 8):
        times: dict[str, float] = {}
        for name in ("eager", "graphs"):
            with attached(model, batch, name == "graphs") as (step, report):
                times[name] = milliseconds(step, STEPS)
                assert report().layers_per_token == 16, report()
                if name == "graphs":
                    assert report().graphs["replayed"] >= STEPS, report()
        model.set_attn_implementation("sdpa")
        times["stock"] = milliseconds(stepping(model, DynamicCache(), batch), STEPS)
        try:
            static = StaticCache(config=model.config, max_cache_len=LENGTH + STEPS + 32)
            compiled = torch.compile(model, mode="reduce-overhead")
            times["compiled"] = milliseconds(stepping(model, static, batch, forward=compiled), STEPS)
        except Exception as error:  # versions of torch and transformers differ in what compiles
            yield f"<!-- torch.compile failed: {str(error).splitlines()[0]} -->"
        model.set_attn_implementation("exeunt")
        torch.compiler.reset()
        allow = read(model, batch, LENGTH, 32) / read(model, batch, LENGTH, 16)
        best = times.get("compiled", times["stock"])
        gain = best / times["graphs"]
        yield (f"| {batch} | {times['stock']:.2f} | {times.get('compiled', float('nan')):.2f} | {times['eager']:.2f} | "
               f"{times['graphs']:.2f} | {gain:.2f} | {allow:.2f} | {gain / allow:.2f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the table is appended to")
    asked = parser.parse_args()
    torch.manual_seed(0)
    lines = ["\n"]
    for line in table():
        print(line, flush=True)
        lines.append(line + "\n")
    if asked.out:
        with asked.out.open("a") as file:
            file.writelines(lines)


if __name__ == "__main__":
    main()
