"""What an int8 head costs in answers: how often it says what the full head says, on a model's own states.

    python benchmarks/int8_head.py [--text FILE ...]

The final states of the small LM that ships and of SmolLM2-135M (if its package is there) over Python's help on its own
language (pydoc's topics) meet the head as it lies in float32 and packed copies of it, in bfloat16 and in int8. Said:
how many tokens have the same arg max, and how far the margin of the two likeliest tokens, which CALM compares with a
threshold, moves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table

import exeunt
from exeunt import small_lm, smollm2

LENGTH = 256


@torch.no_grad()
def states(model, tokenizer, text, rows):
    """[rows * LENGTH, D] states that the head would read, float32."""
    ids = tokenizer(text[: rows * LENGTH * 8], return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[: min(rows, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)
    return torch.cat([model.model(row[None]).last_hidden_state[0] for row in ids]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="other texts")
    parser.add_argument("--rows", type=int, default=32, help=f"of {LENGTH} tokens; default 32")
    args = parser.parse_args()
    text = "\n".join(file.read_text() for file in args.text) if args.text else "\n".join(topics.values())
    table = Table("model", "copy", "same arg max", "margin moves: mean", "99th percentile", "largest")
    for name, load in (("small LM", small_lm.load), ("SmolLM2-135M", smollm2.load)):
        try:
            model, tokenizer = load()
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        hidden, head = states(model, tokenizer, text, args.rows), model.get_output_embeddings().weight.detach().float()
        full = exeunt.ops.exit_stats(hidden, head)
        for dtype in (torch.bfloat16, torch.int8):
            stats = exeunt.ops.exit_stats(hidden, exeunt.ops.PackedHead(head, dtype))
            moved = (stats.margin - full.margin).abs()
            table.add_row(
                f"{name}, {len(hidden)} tokens", str(dtype).removeprefix("torch."),
                f"{(stats.argmax == full.argmax).float().mean():.2%}",
                f"{moved.mean():.4f}", f"{moved.quantile(0.99):.4f}", f"{moved.max():.3f}",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
