"""Train a small language model whose early layers know the answer, from scratch, in an hour or two on one core.

A stock LlamaForCausalLM of 12 layers and 9.8 million parameters with its own tokenizer, trained with losses after
layers 2, 4, 6, 8, 10 and 12, deeper ones weighing more, and a little distillation from the last into the others.

    python examples/train_small_lm.py --text text --out small-lm

small_lm_text.py says where the text comes from. A run that was stopped goes on where it was, a finished one can be
continued with more --steps, on another machine, too (torchrun for several GPUs). `--measure` says what the folder's
model is worth at every exit.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import small_lm_text
from exeunt.files import written
from exeunt.training import CrossEntropy, Distillation, Joint, Objective, Windows, depth_weights, fit, muon
from exeunt.training.loop import digest

LAYERS = 12
EXITS = (1, 3, 5, 7, 9)  # 0-based: after 2, 4, ... layers
END = "<|end|>"  # between documents
LENGTH = 256  # tokens of a row
BATCH = 16  # rows of a step
EVERY = 40  # of so many documents one is held out


def prepare(text: Path, out: Path) -> tuple[Any, Any]:
    """Tokens to train on and held-out ones, written once beside the tokenizer."""
    files = [out / "train.npy", out / "held_out.npy"]
    if not all(file.exists() for file in files):
        parts: tuple[list[str], list[str]] = ([], [])
        for documents in small_lm_text.documents(text).values():
            for i, document in enumerate(documents):
                parts[i % EVERY == EVERY // 2].append(document + END)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(parts[0], trainer)
        tokenizer.save(str(out / "tokenizer.json"))
        order = np.random.default_rng(0).permutation(len(parts[0]))
        for file, documents in zip(files, ([parts[0][i] for i in order], parts[1]), strict=True):
            ids = np.concatenate([np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(documents)])
            with written(file) as unfinished, open(unfinished, "wb") as stream:
                np.save(stream, ids)
    return tuple(np.load(file, mmap_mode="r") for file in files)  # type: ignore[return-value]


def build(vocabulary: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def measure(joint: Joint, tokens: Any, rows: int) -> dict[int, dict[str, float]]:
    """Perplexity and agreement with full depth on the first rows of held-out text, by number of layers run."""
    windows = np.stack([tokens[k * LENGTH : (k + 1) * LENGTH + 1] for k in range(rows)]).astype(np.int64)
    device = next(joint.parameters()).device
    nats, agrees = dict.fromkeys((*EXITS, LAYERS - 1), 0.0), dict.fromkeys((*EXITS, LAYERS - 1), 0)
    for ids in torch.from_numpy(windows).to(device).split(8):
        with torch.autocast(device.type, torch.bfloat16, enabled=joint.bf16):
            depths = joint.depths(ids[:, :-1])
        logits = {e: (d.state @ d.weight.to(d.state.dtype).t()).float() for e, d in depths.items()}
        for e, z in logits.items():
            nats[e] += torch.nn.functional.cross_entropy(z, ids[:, 1:].flatten(), reduction="sum").item()
            agrees[e] += int((z.argmax(-1) == logits[LAYERS - 1].argmax(-1)).sum())
    count = rows * LENGTH
    return {e + 1: {"perplexity": math.exp(nats[e] / count), "agreement": agrees[e] / count} for e in nats}


def show(measured: dict[int, dict[str, float]], title: str) -> None:
    table = Table("layers run", "perplexity", "agreement with 12", title=title)
    for layers, values in measured.items():
        table.add_row(str(layers), f"{values['perplexity']:.2f}", f"{values['agreement']:.1%}")
    Console().print(table)


def save(out: Path, joint: Joint, metadata: dict[str, Any]) -> None:
    """The model as an ordinary folder, in bfloat16."""
    joint.model.to(torch.bfloat16).save_pretrained(out / "model")
    (out / "model" / "training.json").write_text(json.dumps(metadata, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path("/"), help="where the packages were unpacked; default /, as installed")
    add("--out", type=Path, required=True, help="folder for tokenizer, tokens, checkpoints and the model")
    add("--steps", type=int, default=1600, help=f"of {BATCH * LENGTH} tokens; default 1600")
    add("--learning-rate", type=float, default=3e-3, help="its peak; default 0.003")
    add("--pieces", type=int, default=2, help="do a step in so many pieces; 1 on a GPU; default 2")
    add("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    add("--seed", type=int, default=0, help="for weights and order; default 0")
    add("--every", type=float, default=60, help="seconds between checkpoints; default 60")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = prepare(args.text, args.out)
    vocabulary = Tokenizer.from_file(str(args.out / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(args.seed)
    objective = Objective(CrossEntropy(depth_weights("depth", [*EXITS, LAYERS - 1])), Distillation(0.1))
    joint = Joint(build(vocabulary), EXITS, objective, bf16=not args.float32)
    outcome = fit(
        joint,
        Windows(train, LENGTH, BATCH, args.seed),
        args.out / "checkpoint",
        steps=args.steps,
        optimizers=muon(joint, args.learning_rate),
        identity={"data": digest(train), "objective": repr(objective), "learning_rate": args.learning_rate},
        pieces=args.pieces,
        seed=args.seed,
        every=args.every,
        title="Small LM",
    )
    measured = measure(joint, held_out, (len(held_out) - 1) // LENGTH)
    show(measured, f"Held-out text after {outcome['steps']} steps")
    save(args.out, joint, outcome | {"data": small_lm_text.LICENCES, "held_out": measured})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: the last checkpoint is kept, the same command goes on from it.")
