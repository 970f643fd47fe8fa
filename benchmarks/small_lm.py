"""What the small LM's exits are worth: on held-out text at every exit, and on the clock with CALM.

    python benchmarks/small_lm.py --tokens small-lm/held_out.npy [--model small-lm/model] [--cpu-time]

The held-out tokens are what examples/train_small_lm.py left out (with --tokens-only it writes them and stops); without
--model they are fed to the model that ships.
Three tables. Perplexity and agreement with full depth at every exit. CALM under teacher forcing: the text's own tokens
are fed, and each next token that CALM would have chosen is compared with that of the model alone on the same prefix, so
that what skipped layers did to keys and values counts. CALM in free generation, greedy and sampled: tokens/s against
full depth, both sides taking turns in one run, median of the ratios (and the lowest and highest), and how many of its
greedy tokens full depth would have chosen after the same prefix. "Bound" is what the same exits would be worth if
checks, keys and values of skipped layers and everything else that early exit adds were free: in a batch a layer runs if
one row needs it, so that a step runs the layers of its deepest row, and what a step costs beside its layers (the head,
generate itself) does not shrink; both follow from the model cut after the first exit, which takes its turn as well.
--cpu-time counts the process's seconds of computing with one thread instead of the clock's: on a machine that does
other things as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import exeunt
from exeunt import small_lm
from exeunt.calibration.live import live_losses
from exeunt.training import Joint, judge, parse, summary

PROMPT = 64
clock = time.perf_counter


def generate(model: Any, prompt: Tensor, count: int, **options: Any) -> tuple[Tensor, float]:
    start = clock()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
    return out, clock() - start


def at_every_exit(model: Any, text: Tensor, exits: list[int]) -> dict[str, Any]:
    joint = Joint(model, exits, parse("ce", [*exits, len(model.model.layers) - 1]))
    with torch.no_grad():
        return summary(judge(joint.depths(ids[:, :-1]), ids[:, 1:].flatten(), None) for ids in text.split(8))


@contextmanager
def cut(model: Any, layers: int) -> Iterator[None]:
    """The model without all but its first layers: what a step costs in which every row leaves there, for free."""
    whole, config = model.model.layers, model.config
    model.model.layers, config.num_hidden_layers = whole[:layers], layers
    try:
        yield
    finally:
        model.model.layers, config.num_hidden_layers = whole, len(whole)


def race(model: Any, recipe: Any, prompts: list[Tensor], count: int, sample: bool) -> dict[str, float]:
    """Tokens/s of both sides, layers for a token and for a step, and what these would be worth at best."""
    depth, first = len(model.model.layers), min(recipe.exits) + 1
    seconds: dict[str, list[float]] = {"full": [], "early": [], "cut": []}
    agrees, layers, deepest = [], [], []
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50} if sample else {"do_sample": False}
    for turn, prompt in enumerate([prompts[0], *prompts]):  # the first warms up
        for side in ("full", "cut", "early") if turn % 2 else ("early", "cut", "full"):
            torch.manual_seed(turn)
            if side == "early":
                with exeunt.attach(model, recipe) as early:
                    out, took = generate(model, prompt, count, **options)
                    report = early.report()
                layers.append(report.layers_per_token)
                deepest.append(torch.stack(report.exit_layers).amax(1).add(1).float().mean().item())
                with torch.no_grad():
                    chosen = model(out[:, :-1]).logits.argmax(-1)[:, PROMPT:]
                agrees.append((chosen == out[:, PROMPT + 1 :]).float().mean().item())
            else:
                with cut(model, first if side == "cut" else depth):
                    _, took = generate(model, prompt, count, **options)
            if turn:
                seconds[side].append(took)
    ratios = [full / early for full, early in zip(seconds["full"], seconds["early"], strict=True)]
    middle = {side: statistics.median(some) for side, some in seconds.items()}
    tokens, run = prompts[0].shape[0] * count, statistics.mean(deepest[1:])
    layer = (middle["full"] - middle["cut"]) / (depth - first)
    return {"full": tokens / middle["full"], "early": tokens / middle["early"], "cut": tokens / middle["cut"],
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "layers": statistics.mean(layers[1:]), "deepest": run, "agreement": statistics.mean(agrees[1:]),
            "bound": middle["full"] / (middle["full"] - (depth - run) * layer),
            "fixed": 1 - depth * layer / middle["full"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=small_lm.FOLDER, help="folder of the model; default the one that ships")
    add("--tokens", type=Path, required=True, help="held-out token ids, *.npy")
    add("--exits", default="1,3,5,7,9", help="0-based layers of the first table; default 1,3,5,7,9")
    add("--at", default=",".join(map(str, small_lm.EXITS)), help="those that CALM uses; default the shipped recipe's")
    add("--eager", action="store_true", help="fill in skipped layers at once, not lazily")
    add("--cpu-time", action="store_true", help="one thread, and seconds of computing instead of the clock's")
    add("--confidence", default="margin", help="measure; default margin")
    add("--thresholds", type=float, nargs="+", default=[0.04, 0.08, 0.16], help="default 0.04 0.08 0.16")
    add("--rows", type=int, default=64, help="of held-out text, 256 tokens each; default 64")
    add("--rounds", type=int, default=8, help="of the races, 0: none; default 8")
    add("--batch", type=int, nargs="+", default=[1, 8], help="rows of the races; default 1 8")
    add("--count", type=int, default=96, help="new tokens in a race; default 96")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if args.cpu_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    model.generation_config.eos_token_id = None  # rows go on to the same length on both sides
    exits = [int(e) for e in args.exits.split(",")]
    tokens = np.load(args.tokens, mmap_mode="r")
    starts = np.linspace(0, len(tokens) - 257, args.rows).astype(int)
    text = torch.from_numpy(np.stack([tokens[s : s + 257] for s in starts]).astype(np.int64))
    show = Console(width=140).print
    found: dict[str, Any] = {"every exit": at_every_exit(model, text, exits)}

    table = Table("layers run", "perplexity", "agreement", title=f"Held-out text, {args.rows * 256} tokens")
    for depth, f in found["every exit"].items():
        table.add_row(str(int(depth) + 1), f"{f['perplexity']:.2f}", f"{f['agreement']:.1%}")
    show(table)

    at = [int(e) for e in args.at.split(",")]
    recipes = {t: exeunt.recipes.calm(at, t, confidence=args.confidence, lazy=not args.eager) for t in args.thresholds}
    table = Table(
        "threshold", "agreement", "layers/token", title=f"CALM ({args.confidence}), exits {at}, teacher forcing"
    )
    for t, recipe in recipes.items():
        live = live_losses(model, recipe, text[:, :256].numpy(), [t], prompt=PROMPT, batch=32)
        f = {"agreement": 1 - live.losses.mean(), "layers": live.layers[0]}
        found[f"forced {t}"] = f
        table.add_row(str(t), f"{f['agreement']:.1%}", f"{f['layers']:.2f}")
    show(table)

    columns = ("rows", "mode", "threshold", "full tok/s", "CALM tok/s", "ratio", "layers/token", "layers/step", "bound",
               "fixed", "agreement")  # fmt: skip
    table = Table(*columns, title=f"Generation, {torch.get_num_threads()} threads, {args.dtype}")
    for batch in args.batch if args.rounds else ():
        spread = np.linspace(0, len(text) - 1, args.rounds * batch).astype(int)  # each round has text of all sources
        prompts = [text[spread[k :: args.rounds], :PROMPT] for k in range(args.rounds)]
        for mode in ("greedy", "sampled"):
            for t, recipe in recipes.items():
                f = race(model, recipe, prompts, args.count, mode == "sampled")
                found[f"{mode} B={batch} {t}"] = f
                table.add_row(
                    str(batch), mode, str(t), f"{f['full']:.0f}", f"{f['early']:.0f}",
                    f"{f['ratio']:.2f}x ({f['lowest']:.2f}-{f['highest']:.2f})",
                    f"{f['layers']:.2f}", f"{f['deepest']:.2f}", f"{f['bound']:.2f}x", f"{f['fixed']:.0%}",
                    f"{f['agreement']:.1%}" if mode == "greedy" else "-",
                )  # fmt: skip
    if args.rounds:
        show(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
