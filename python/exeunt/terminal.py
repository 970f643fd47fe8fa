"""What the commands share: how they load, read and refuse."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from exeunt import files, small_lm

__all__ = [
    "Parser",
    "Refused",
    "check_folder",
    "check_writable",
    "layers",
    "load",
    "positive",
    "progress",
    "quiet",
    "read",
    "refusing",
    "text",
]


def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer that ``--model`` names: ``small``, ``smollm2`` or a folder.

    Examples
    --------
    >>> import torch
    >>> from exeunt.terminal import load
    >>> model, tokenizer = load("small", torch.float32)
    >>> len(model.model.layers), tokenizer.padding_side
    (12, 'left')
    """
    if name == "small":
        return small_lm.load(dtype)
    if name == "smollm2":
        from exeunt import smollm2

        return smollm2.load(dtype, progress=sys.stderr.isatty())
    if not Path(name).is_dir():
        raise ValueError(f"--model must be small, smollm2 or a folder with a model, got {name}")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = "model"
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=True)
        part = "tokenizer"
        return model, AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, SafetensorError, ValueError) as error:  # some of several lines
        why = str(error).splitlines()[0].rstrip(" :")
        raise ValueError(
            f"--model must be a folder with a model and its tokenizer, got {name}, whose {part} cannot be loaded: {why}"
        ) from error


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal's standard error; what is yielded takes what was done.

    Examples
    --------
    >>> from exeunt.terminal import progress
    >>> with progress("Decoding", total=20) as advance:
    ...     for batch in (8, 8, 4):
    ...         advance(batch)
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def read(path: Path) -> list[str]:
    """Texts of a file, or of the ``*.txt`` files below a folder.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from exeunt.terminal import read
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "b.txt").write_text("second"), Path(folder, "a.txt").write_text("first")
    ...     read(Path(folder))
    ['first', 'second']
    """
    files, texts = sorted(path.rglob("*.txt")) if path.is_dir() else [path], []
    if not files:
        raise ValueError(f"--data must be a text file or a folder of *.txt files, got {path}, which has none")
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--data must be text in UTF-8, got {file}: {error.reason} at {error.start}") from error
    return texts


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on how it is called, and without its progress bars, which take no time.

    Examples
    --------
    >>> from transformers.utils import logging
    >>> from exeunt.terminal import quiet
    >>> with quiet():
    ...     logging.get_verbosity() == logging.ERROR, logging.is_progress_bar_enabled()
    (True, False)
    """
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


class Refused(Exception):
    """What the user can put right, in one sentence.

    Examples
    --------
    >>> from exeunt.terminal import Refused, refusing
    >>> try:
    ...     with refusing():
    ...         raise OSError("the disk is full")
    ... except Refused as sentence:
    ...     print(sentence)
    the disk is full
    """


@contextmanager
def refusing() -> Iterator[None]:
    """Make what the user can put right a `Refused`.

    Examples
    --------
    >>> from exeunt.terminal import refusing
    >>> with refusing():
    ...     raise ValueError("level must lie in 0..1, got 2")
    Traceback (most recent call last):
        ...
    exeunt.terminal.Refused: level must lie in 0..1, got 2
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads on: nothing to put right
        raise
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        raise Refused(str(error)) from error


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence.

    Examples
    --------
    >>> from exeunt.terminal import Parser
    >>> parser = Parser(prog="exeunt")
    >>> _ = parser.add_argument("--threshold", type=float)
    >>> parser.parse_args(["--threshold", "-inf"]).threshold  # a number, not an option
    -inf
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf$)")  # Python < 3.14 takes -1e-3 for an option

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage, and leave."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A whole number from 1 on.

    Examples
    --------
    >>> from exeunt.terminal import positive
    >>> positive("12")
    12
    """
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return value


def layers(text: str) -> list[int]:
    """Layers such as ``8,12``.

    Examples
    --------
    >>> from exeunt.terminal import layers
    >>> layers("8,12")
    [8, 12]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers such as 8,12,16, got {text!r}") from None


def text(given: str) -> str:
    """A text that is not empty.

    Examples
    --------
    >>> from exeunt.terminal import text
    >>> text("a prompt")
    'a prompt'
    >>> text("  ")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: expected a text, got '  '
    """
    if not given.strip():
        raise argparse.ArgumentTypeError(f"expected a text, got {given!r}")
    return given


def check_folder(path: Path) -> None:
    """Raise unless ``--out`` is a folder to write into, or can become one; nothing is made.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from exeunt.terminal import check_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_folder(Path(folder, "new", "run"))
    ...     Path(folder, "new").exists()
    False
    """
    there = next(p for p in (path, *path.parents) if p.exists())
    problem = "" if os.access(there, os.W_OK) else f"{there} cannot be written"
    if not there.is_dir():
        problem = f"{there} is a file"
    if problem:
        raise OSError(f"--out must be a folder, got {path}: {problem}")


def check_writable(path: Path | None) -> None:
    """Raise unless a file can be written there; nothing stays behind.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from exeunt.terminal import check_writable
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_writable(Path(folder, "out.html"))
    ...     list(Path(folder).iterdir())
    []
    """
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
