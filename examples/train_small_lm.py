"""Train a small language model whose early layers know the answer, from scratch, in two or three hours on one core.

A stock LlamaForCausalLM of 12 layers and 9.8 million parameters with its own tokenizer, trained in three runs. The
first has losses after layers 2, 4, 6, 8, 10 and 12, deeper ones weighing more, and a little distillation from the last
into the others. The second goes on with the exits that are worth a check, and much distillation. In the third tokens
leave early while it learns: exits and deeper layers are taught to say what the model alone would, also where earlier
tokens left behind what propagation makes of their states. That is the model that comes with exeunt.

    python examples/train_small_lm.py --text text --out small-lm

small_lm_text.py says where the text comes from. A run that was stopped goes on where it was, a finished one can be
continued with more steps, on another machine, too (on a GPU in minutes; with torchrun on several). With --start the
first run is left out, and the others go on from a model that it made. Then benchmarks/small_lm.py says what the exits
are worth on the clock.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import small_lm_text
from exeunt.calibration import fingerprints
from exeunt.files import written
from exeunt.training import (
    SAID,
    CrossEntropy,
    Distillation,
    Joint,
    Leaving,
    Objective,
    Windows,
    depth_weights,
    fit,
    judge,
    muon,
    summary,
)
from exeunt.training.loop import digest

LAYERS = 12
EXITS = (1, 3, 5, 7, 9)  # 0-based: after 2, 4, ... layers
USEFUL = (3, 5, 7)  # of the second run
CHECKED = (3, 5)  # of the third
END = "<|end|>"  # between documents
LENGTH = 256  # tokens of a row
BATCH = 16  # rows of a step
EVERY = 40  # of so many documents one is held out

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    "model_max_length": LENGTH,
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    # It does not chat, it goes on.
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


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
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **CONFIG))


@torch.no_grad()
def measure(joint: Joint, tokens: Any) -> dict[str, dict[str, Any]]:
    """Perplexity and agreement with full depth on 51,200 held-out tokens, by 0-based layer."""
    starts = np.linspace(0, len(tokens) - LENGTH - 1, 200).astype(int)  # of all sources
    rows = np.stack([tokens[start : start + LENGTH + 1] for start in starts]).astype(np.int64)
    parts = torch.from_numpy(rows).to(next(joint.parameters()).device).split(8)
    return summary(judge(joint.depths(ids[:, :-1]), ids[:, 1:].flatten(), None) for ids in parts)


def show(measured: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("layers run", "perplexity", f"agreement with {LAYERS}", title=title)
    for layer, values in measured.items():
        table.add_row(str(int(layer) + 1), f"{values['perplexity']:.2f}", f"{values['agreement']:.1%}")
    Console().print(table)


def save(out: Path, joint: Joint, vocabulary: int, metadata: dict[str, Any]) -> None:
    """The model as an ordinary folder, in bfloat16: plain JSON, which old and new transformers read alike."""
    folder = out / "model"
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, **CONFIG}
    files = {"config": config, "tokenizer_config": TOKENIZER, "training": metadata}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    (folder / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    weights = {name: p.detach().bfloat16().cpu().contiguous() for name, p in joint.model.named_parameters()}
    with written(folder / "model.safetensors") as unfinished:
        unfinished.write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path("/"), help="where the packages were unpacked; default /, as installed")
    add("--out", type=Path, required=True, help="folder for tokenizer, tokens, checkpoints and the model")
    add("--tokens-only", action="store_true", help="stop when tokens to train on and held-out ones are written")
    add("--steps", type=int, default=640, help=f"of the first run, of {BATCH * LENGTH} tokens; default 640")
    add("--further-steps", type=int, default=640, help="of the second run, 0: without it; default 640")
    add("--leaving-steps", type=int, default=400, help="of the third run, 0: without it; default 400")
    add("--learning-rate", type=float, default=6e-3, help="peak of the first run; default 0.006")
    add("--further-rate", type=float, default=4e-3, help="peak of the second run; default 0.004")
    add("--leaving-rate", type=float, default=3e-3, help="peak of the third run; default 0.003")
    add("--start", type=Path, help="folder of a model that the first run made: leave that run out")
    add("--pieces", type=int, default=2, help="do a step in so many pieces; 1 on a GPU; default 2")
    add("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    add("--seed", type=int, default=0, help="for weights and order; default 0")
    add("--every", type=float, default=60, help="seconds between checkpoints; default 60")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = prepare(args.text, args.out)
    if args.tokens_only:
        return
    vocabulary = Tokenizer.from_file(str(args.out / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(args.seed)
    model = build(vocabulary)
    data = digest(train)
    runs: dict[str, Any] = {}
    if args.start is not None:
        model.load_state_dict(safetensors.torch.load_file(args.start / "model.safetensors"), strict=False)  # tied head
        runs["joint"] = json.loads((args.start / "training.json").read_text())["runs"]["joint"]
        if runs["joint"]["data"] != data:
            sys.exit(f"{args.start}: expected a model of text {data}, got one of {runs['joint']['data']}")
    bf16 = not args.float32
    at_once = Objective(CrossEntropy(depth_weights("depth", [*EXITS, LAYERS - 1])), Distillation(0.1))
    further = Objective(CrossEntropy(depth_weights("depth", [*USEFUL, LAYERS - 1])), Distillation(1.0))
    leaving = Objective(CrossEntropy({SAID: 1.0}), Distillation(2.0))
    joint = Joint(model, EXITS, at_once, bf16=bf16)
    shapes: list[tuple[str, Joint, int, float, dict[str, Any]]] = [
        ("joint", joint, args.steps, args.learning_rate, {}),
        ("further", Joint(model, USEFUL, further, bf16=bf16), args.further_steps, args.further_rate,
         {"fall": 0.0 if args.leaving_steps else 0.2, "warmup": 20}),
        ("leaving", Leaving(model, CHECKED, leaving, bf16=bf16), args.leaving_steps, args.leaving_rate,
         {"fall": 0.5, "warmup": 20}),
    ]  # fmt: skip
    windows = Windows(train, LENGTH, BATCH, args.seed)
    done = sum(run["steps"] for run in runs.values())  # steps of earlier runs: the text goes on where they left it
    for name, module, steps, rate, shape in shapes:
        if not steps or name in runs:
            continue
        identity = {"data": data, "objective": repr(module.objective), "learning_rate": rate}
        outcome = fit(
            module,
            lambda step, done=done: windows(done + step),  # type: ignore[misc]
            args.out / name,
            steps=steps,
            optimizers=muon(module, rate),
            identity=identity | ({"after": done} if done else {}),
            pieces=args.pieces,
            seed=args.seed,
            every=args.every,
            title=f"Small LM, {name}",
            **shape,
        )
        runs[name] = outcome | identity
        done += steps
        with torch.no_grad():  # what is kept is bfloat16: so is what the next run begins with
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    measured = measure(joint, held_out)
    show(measured, f"Held-out text after {done} steps")
    sketch = fingerprints.sketch(train)  # so that nobody calibrates on what it was trained on
    about = {"runs": runs, "text": small_lm_text.LICENCES, "held_out": measured, "sketch": sketch}
    save(args.out, joint, vocabulary, about)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: the last checkpoint is kept, the same command goes on from it.")
