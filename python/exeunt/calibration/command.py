"""``exeunt calibrate``."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch

from exeunt import confidence, policies, recipes, small_lm, terminal
from exeunt.calibration import calibrating, live
from exeunt.calibration.calibrating import METHODS
from exeunt.calibration.live import RISKS

__all__ = ["add_parser"]

CALIBRATE = """\
Find the threshold at which tokens may leave a language model early so that what is lost stays below a level, and write
it down with what it promises.

The text is cut into pieces of equal length, and some of them are drawn: the units, whose losses the promise is about.
Each candidate threshold decodes each of them, from safe to loose, until one fails. The pieces must be like those that
come later, and none may have been trained on: where model or exit heads say on what, overlap is refused.

The result is used by exeunt.attach(model, recipe, calibration=file), which refuses another model, heads or recipe.
"""
CALIBRATE_END = """\
risks:
{risks}

methods:
{methods}

examples:
  exeunt calibrate --model small --data texts/ --level 0.1 --out small.json
  exeunt calibrate --model ./llama --exits 8,16 --data texts/ --risk rouge-l --level 0.2 --method crc --out llama.json
  exeunt calibrate --model smollm2 --measure probe --data chats.txt --level 0.1 --check 200 --out smollm2.json

docs/calibration.md says what each method promises, and how much of it is used.
"""
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)  # of measures from 0 to 1
GRIDS = {
    "neg_entropy": (-0.1, -0.25, -0.5, -1, -1.5, -2, -2.5, -3, -4),
    "neg_normalized_entropy": (-0.02, -0.05, -0.1, -0.15, -0.2, -0.25, -0.3, -0.4, -0.5),
    "saturation": (0.995, 0.99, 0.98, 0.97, 0.95, 0.9),
}


def add_parser(commands: Any) -> None:
    """Add the command to those of `exeunt`.

    Examples
    --------
    >>> import argparse
    >>> from exeunt.calibration.command import add_parser
    >>> parser = argparse.ArgumentParser()
    >>> add_parser(parser.add_subparsers())
    >>> given = parser.parse_args("calibrate --model small --data texts --level 0.1 --out small.json".split())
    >>> given.level, given.method, given.risk
    (0.1, 'ltt', 'next-token')
    """
    fit = commands.add_parser(
        "calibrate",
        help="find a threshold that keeps a promise",
        description=CALIBRATE,
        epilog=CALIBRATE_END.format(
            **{
                name: "\n".join(f"  {key:<12} {what}" for key, what in entries.items())
                for name, entries in (("risks", RISKS), ("methods", METHODS))
            }
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = fit.add_argument
    add("--model", required=True, metavar="FOLDER", help="a transformers model, or small, or smollm2")
    add("--data", required=True, type=Path, metavar="PATH", help="text file, or folder of *.txt files")
    add("--level", required=True, type=float, metavar="X", help="risk to stay below, between 0 and 1")
    add("--out", required=True, type=Path, metavar="FILE", help="for the calibration, JSON")
    add(
        "--heads", type=Path, metavar="FILE", help="exit heads, as exeunt train writes them (smollm2: the shipped ones)"
    )
    add(
        "--exits",
        type=terminal.layers,
        metavar="E,E",
        help=f"layers to leave after, from 0 on (those of the heads; small: {','.join(map(str, small_lm.EXITS))})",
    )
    add(
        "--measure",
        choices=list(confidence.MEASURES),
        default="margin",
        help="what is compared with the threshold (margin)",
    )
    add("--risk", choices=list(RISKS), default="next-token", help="what is kept below the level (next-token)")
    add("--method", choices=list(METHODS), default="ltt", help="what kind of promise (ltt)")
    add("--confidence", type=float, default=0.95, metavar="X", help="of the promise, not for crc (0.95)")
    add("--candidates", type=float, nargs="+", metavar="X", help="thresholds, from safe to loose (by the measure)")
    add("--prompts", type=terminal.positive, default=200, metavar="N", help="pieces of text to calibrate on (200)")
    add("--check", type=terminal.positive, metavar="N", help="measure the risk of the result on so many others")
    add("--prompt-tokens", type=terminal.positive, default=64, metavar="N", help="of a piece that are given (64)")
    add("--tokens", type=terminal.positive, default=64, metavar="N", help="of a piece that are decoded (64)")
    add("--batch", type=terminal.positive, default=8, metavar="N", help="pieces decoded together (8)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model (float32)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw of pieces (0)")
    fit.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    with terminal.refusing():
        for package in ("transformers", "safetensors", "rich"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"this needs {package}: pip install exeunt[train]")
        text = terminal.read(args.data)  # before the model is loaded
        terminal.check_writable(args.out)
        candidates = tuple(args.candidates or GRIDS.get(args.measure, GRID))
        measure = confidence.measure(args.measure)
        policies.Threshold(candidates).check(measure.low, measure.high, measure.name)
        with terminal.quiet():
            model, tokenizer = terminal.load(args.model, getattr(torch, args.dtype))
            recipe, trained = _recipe(args, model, candidates[0])
            ids = [token for part in text for token in tokenizer(part, verbose=False).input_ids]
            length, count = args.prompt_tokens + args.tokens, args.prompts + (args.check or 0)
            texts = live.units(ids, length, count, args.seed)
            run: dict[str, Any] = {"risk": args.risk, "prompt": args.prompt_tokens, "tokenizer": tokenizer}
            run["batch"] = args.batch
            with terminal.progress("Decoding", args.prompts * (len(candidates) + 2)) as advance:
                found = calibrating.calibrate(
                    model,
                    recipe,
                    texts[: args.prompts],
                    candidates,
                    level=args.level,
                    confidence=args.confidence,
                    method=args.method,
                    trained=trained,
                    advance=advance,
                    **run,
                )
            for threshold, losses, layers in zip(candidates, found.live.losses, found.live.layers, strict=False):
                print(f"{args.measure} >= {threshold:g}: risk {losses.mean():.4f}, {layers:.2f} layers a token")
            if args.check:
                with terminal.progress("Checking", 2 * args.check) as advance:
                    rest = texts[args.prompts :]
                    checked = live.live_losses(model, recipe, rest, [found.threshold], advance=advance, **run)
        found.calibration.save(args.out)
    if found.threshold == float("inf"):
        print("No candidate was shown to be safe: the calibration is full depth.")
    else:
        print(f"Threshold {found.threshold:g}: {found.calibration.contract}")
    if args.check:
        losses, layers = checked.losses[0], checked.layers[0]
        error = losses.std() / len(losses) ** 0.5
        print(f"On {args.check} other pieces: risk {losses.mean():.4f} +- {error:.4f}, {layers:.2f} layers a token")
    print(f"wrote {args.out}")


def _recipe(args: argparse.Namespace, model: Any, threshold: float) -> tuple[recipes.Recipe, list[str]]:
    """What is calibrated, and sketches of what model and heads were trained on."""
    from exeunt import smollm2
    from exeunt.heads import ExitHeads
    from exeunt.training import sketches

    heads = None
    if args.heads is not None:
        heads = ExitHeads.load(args.heads, model.config).to(model.get_output_embeddings().weight)
    elif args.model == "smollm2":
        heads = smollm2.exit_heads(model)
    exits = args.exits or (small_lm.EXITS if args.model == "small" and heads is None else None)
    told = sketches(model)
    if heads is not None and "sketch" in heads.metadata:
        told.append(heads.metadata["sketch"])
    return recipes.calm(exits, threshold, confidence=args.measure, heads=heads, lazy=True), told
