"""What the state strategies do to keys, values and outputs, and what they cost: the tables of docs/states.md.

    python benchmarks/states.py --tokens small-lm/held_out.npy [--batch 1 8] [--threshold 0.08] [--wall]

Held-out text is fed to the small LM token by token with CALM's exits on, and the same text to the model alone. Of each
strategy: how far keys and values of the layers behind the first exit are from those of full depth (relative, over
all tokens), how far the logits of tokens that ran all layers are (KL divergence in nats, and how often another token
comes first), how many layer-rows a token ran, late ones included, and the time of the steps without exits over that
with them, in turns. Then FREE: free generation with the same threshold at one exit, with Defer and with Propagate;
agreement is how many of its tokens full depth would have chosen after the same prefix. Seconds are the process's own,
with one thread, unless --wall.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

import exeunt
from exeunt import small_lm
from exeunt.recipes import Recipe
from exeunt.states import Defer, Evict, Propagate, Recompute

PROMPT = 64
STATES = [Propagate(), Propagate(lazy=True), Defer(), Recompute(), Evict()]
clock = time.process_time


@torch.no_grad()
def feed(model: Any, text: Tensor) -> tuple[Tensor, Any, float]:
    """Logits [T, B, V] of the tokens after the prompt, the cache, and seconds."""
    cache, found = DynamicCache(), []
    model(input_ids=text[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
    start = clock()
    for t in range(PROMPT, text.shape[1]):
        found.append(model(input_ids=text[:, t : t + 1], past_key_values=cache).logits[:, 0])
    return torch.stack(found), cache, clock() - start


def relative_error(got: Any, want: Any, what: str, first: int) -> float:
    """Of keys or values of the layers from ``first`` on, tokens after the prompt."""
    pairs = [(getattr(g, what), getattr(w, what)) for g, w in zip(got.layers[first:], want.layers[first:], strict=True)]
    wrong = sum(float((g - w)[:, :, PROMPT:].square().sum()) for g, w in pairs)
    return (wrong / sum(float(w[:, :, PROMPT:].square().sum()) for _, w in pairs)) ** 0.5


def compare(model: Any, recipe: Recipe, text: Tensor, batch: int) -> dict[str, float]:
    """One strategy against full depth, ``batch`` rows of the text at a time."""
    found: dict[str, list[float]] = {}
    feed(model, text[:batch, : PROMPT + 8])  # warms up
    assert recipe.exits is not None
    for turn, part in enumerate(text.split(batch)):
        for side in ("stock", "early") if turn % 2 else ("early", "stock"):
            if side == "stock":
                want, stock_cache, stock_seconds = feed(model, part)
                continue
            with exeunt.attach(model, recipe) as early:
                got, cache, seconds = feed(model, part)
                report = early.report()
                layers, depths = report.layer_rows / report.tokens, torch.stack(report.exit_layers)
                for layer in cache.layers:
                    layer.settle()
        deep = depths == report.layers - 1
        p, q = want[deep].log_softmax(-1), got[deep].log_softmax(-1)
        for name, value in {
            "keys": relative_error(cache, stock_cache, "keys", recipe.exits[0] + 1),
            "values": relative_error(cache, stock_cache, "values", recipe.exits[0] + 1),
            "divergence": float((p.exp() * (p - q)).sum(-1).mean()),
            "others": float((p.argmax(-1) != q.argmax(-1)).float().mean()),
            "agreement": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
            "layers": layers,
            "speed": stock_seconds / seconds,
        }.items():
            found.setdefault(name, []).append(value)
    return {name: (statistics.median if name == "speed" else statistics.mean)(values) for name, values in found.items()}


def generate(model: Any, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """Greedy tokens, and seconds."""
    start = clock()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return out, clock() - start


def race(model: Any, recipes: dict[str, Recipe], text: Tensor, batch: int, count: int) -> dict[str, dict[str, float]]:
    """Free generation: tokens/s of every recipe over full depth's, agreement, layers for a token."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in recipes}
    for turn, part in enumerate([text[:batch], *text.split(batch)]):  # the first warms up
        prompt = part[:, :PROMPT]
        _, stock = generate(model, prompt, count)
        for name in list(recipes) if turn % 2 else reversed(recipes):
            with exeunt.attach(model, recipes[name]) as early:
                out, seconds = generate(model, prompt, count)
                layers = early.report().layers_per_token
            with torch.no_grad():
                chosen = model(out[:, :-1]).logits.argmax(-1)[:, PROMPT:]
            agreement = float((chosen == out[:, PROMPT + 1 :]).float().mean())
            if turn:
                for key, value in {"speed": stock / seconds, "agreement": agreement, "layers": layers}.items():
                    found[name].setdefault(key, []).append(value)
    return {name: {k: statistics.median(v) if k == "speed" else statistics.mean(v) for k, v in f.items()}
            for name, f in found.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=Path, required=True, help="held-out token ids, *.npy (examples/train_small_lm.py leaves them)")
    add("--batch", type=int, nargs="+", default=[1, 8], help="rows at a time; default 1 8")
    add("--rows", type=int, default=16, help="rows of text; default 16")
    add("--count", type=int, default=128, help="tokens of a row after the prompt of 64; default 128")
    add("--threshold", type=float, default=small_lm.THRESHOLD, help="of the margin; default the shipped recipe's")
    add("--attention", default="sdpa", choices=["sdpa", "exeunt"], help="of the model, on both sides; default sdpa")
    add("--wall", action="store_true", help="the clock's seconds and torch's threads")
    args = parser.parse_args()
    if args.wall:
        global clock
        clock = time.perf_counter
    else:
        torch.set_num_threads(1)
    model, _ = small_lm.load()
    model.generation_config.eos_token_id = None
    exeunt.register_attention()
    model.set_attn_implementation(args.attention)
    tokens = np.load(args.tokens, mmap_mode="r")
    starts = np.linspace(0, len(tokens) - PROMPT - args.count, args.rows).astype(int)
    text = torch.from_numpy(np.stack([tokens[s : s + PROMPT + args.count] for s in starts]).astype(np.int64))

    calm = exeunt.recipes.calm(small_lm.EXITS, args.threshold)
    lines = [
        f"Fed text: margin {args.threshold}, exits {[*small_lm.EXITS]} of 12 layers, {args.rows} x {args.count}, "
        f"{args.attention} attention.",
        "",
        "| strategy | rows | layers run a token | keys off | values off | KL of deep tokens | another token first | "
        "agreement of all | speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for batch in args.batch:
        for state in track(STATES, f"strategies, {batch} rows at a time"):
            f = compare(model, Recipe(calm.exits, calm.confidence, calm.policy, state), text, batch)
            lines.append(
                f"| `{state}` | {batch} | {f['layers']:.2f} | {f['keys']:.1%} | {f['values']:.1%} | "
                f"{f['divergence']:.4f} | {f['others']:.1%} | {f['agreement']:.1%} | {f['speed']:.2f}x |"
            )
    exit = small_lm.EXITS[0]
    strategies = {"Defer": Defer(), "Propagate, lazy": Propagate(lazy=True), "Propagate": Propagate()}
    recipes = {name: exeunt.recipes.free(exit, args.threshold, state=state) for name, state in strategies.items()}
    recipes["Defer, adaptive"] = exeunt.recipes.free(exit, args.threshold, adaptive=True)
    lines += [
        "",
        f"FREE, free generation: margin {args.threshold}, exit {exit}, {args.count} new tokens, greedy.",
        "",
        "| strategy | rows | layers run a token | agreement | speed |",
        "|---|---|---|---|---|",
    ]
    for batch in args.batch:
        for name, f in race(model, recipes, text, batch, args.count).items():
            lines.append(f"| {name} | {batch} | {f['layers']:.2f} | {f['agreement']:.1%} | {f['speed']:.2f}x |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
