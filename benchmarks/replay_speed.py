"""How long it takes to replay all recipes over many thresholds: 18 recipes x 50 thresholds over 5,000 examples.

python benchmarks/replay_speed.py [--rows 5000] [--layers 12] [--classes 3] [--thresholds 50]
"""

from __future__ import annotations

import argparse
import time

import torch

from exeunt.evaluation.sweep import sweep
from exeunt.replay import Recording


def recording(rows: int, layers: int, classes: int, **more: object) -> Recording:
    """Rows that grow surer with depth, with scores of probes."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, layers, classes, generator=g).cumsum(1)
    labels = torch.randint(classes, (rows,), generator=g)
    measures = {name: torch.rand(rows, layers, generator=g) for name in ("probe", "candidate_probe")}
    return Recording.of_logits(logits, labels=labels, measures=measures, **more)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 5000, "layers": 12, "classes": 3, "thresholds": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    shape = args.rows, args.layers, args.classes
    texts = recording(*shape, costs=tuple(range(1, args.layers + 1)))  # costs, so that cascades apply
    tokens = recording(*shape, positions=torch.arange(args.rows) % 64, limit=64)
    begin = time.perf_counter()
    curves = sweep(texts, args.thresholds) | sweep(tokens, args.thresholds, only={"specee", "skipdecode"}.__contains__)
    seconds = time.perf_counter() - begin
    for name, curve in curves.items():
        print(f"{name:<14} {len(curve):>3} points, {curve[0].mean_layers:5.2f} to {curve[-1].mean_layers:5.2f} layers")
    count = sum(map(len, curves.values()))
    whole = seconds / count * len(curves) * args.thresholds
    print(
        f"{len(curves)} recipes, {count} different replays of {args.rows} rows: {seconds:.2f} s, "
        f"{1e3 * seconds / count:.1f} ms each; {len(curves)} x {args.thresholds} at that rate: {whole:.1f} s"
    )
