"""Recordings on disk: what a model's exits show on data, chunk by chunk.

Running the model is what costs, so a recording that was stopped goes on behind its last chunk, and more data are
appended to what is there. Each chunk is written completely or not at all.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from exeunt.calibration import fingerprints
from exeunt.files import written
from exeunt.replay import Recording
from exeunt.training.recording import tracked

__all__ = ["load", "record"]

CHUNK = 512  # rows of a file
FORMAT = {"format": "exeunt.recording", "version": 2}

Run = Callable[[list[Any]], Tensor | tuple[Tensor, Mapping[str, Tensor]]]


def record(
    run: Run,
    units: Sequence[Any],
    folder: str | os.PathLike[str],
    *,
    exits: Sequence[int],
    layers: int,
    model: Any = None,
    labels: ArrayLike | Tensor | None = None,
    batch: int = 32,
    progress: bool = True,
) -> Recording:
    """Run data through a model and keep what its exits show, or go on where an earlier call stopped.

    Parameters
    ----------
    run : callable
        ``run(units)`` of up to ``batch`` units returns their logits [b, E + 1, C] at each exit and at full depth, or
        these and a dict of scores [b, E + 1] that logits don't give, by the name of the measure. If it has an attribute
        ``heads``, as :func:`exeunt.evaluation.encoders.runner` makes it, the fingerprint of these exit heads goes
        along, and others are refused later on.
    units : sequence
        One a row: texts, bytes, or sequences of token ids. Those that were recorded are not run again; the ones behind
        them are appended.
    folder : path
        Where to.
    exits : sequence of int
        0-based layers.
    layers : int
        Of the model.
    model : nn.Module, optional
        A transformers model: its fingerprint goes along, and another is refused later on.
    labels : array, optional
        [len(units)] int, the truth; may also be given later, for a recording that has none.
    batch : int, default 32
        Units of a call.
    progress : bool, default True

    Returns
    -------
    Recording
        In memory.

    Raises
    ------
    ValueError
        One sentence, before anything is run, if the folder holds a recording of another model, other exit heads, exits,
        data or labels, or if labels are missing for what is to be appended.
    OSError
        If a chunk cannot be written; those before it are kept.

    Examples
    --------
    >>> import tempfile, torch
    >>> from exeunt.evaluation import record
    >>> run = lambda texts: torch.tensor([[[len(t), 0.0], [0.0, len(t)]] for t in texts])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = record(run, ["a", "word"], folder, exits=[0], layers=2, progress=False)
    ...     more = record(run, ["a", "word", "more"], folder, exits=[0], layers=2, progress=False)
    >>> len(first), len(more), more.predicted[2].tolist()
    (2, 3, [0, 1])
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digests = list(fingerprints.of_data(units))
    heads = getattr(run, "heads", None)
    about = {
        **FORMAT,
        "exits": list(exits),
        "layers": layers,
        "model": None if model is None else of_model(model),
        "heads": None if heads is None else fingerprints.of_heads(heads),
    }
    truth = None if labels is None else [int(label) for label in np.asarray(labels)]
    if truth is not None and len(truth) != len(units):
        raise ValueError(f"labels must be one for each of {len(units)} units, got {len(truth)}")
    index = folder / "recording.json"
    done: list[str] = []
    chunks: list[int] = []
    if index.exists():
        found = _index(folder)
        _refuse_other(folder, found, about)
        done, chunks = found["data"], found["chunks"]
        if done != digests[: len(done)]:
            differing = [i for i, (a, b) in enumerate(zip(done, digests, strict=False)) if a != b]
            where = f"unit {differing[0]} differs" if differing else f"it has {len(done)} units, got {len(digests)}"
            raise ValueError(f"{folder} holds a recording of other data: {where}")
        truth = _agreed(folder, found["labels"], truth, len(units))
        if found["labels"] is None and truth is not None:  # for what is there
            _write_index(index, {**found, "labels": truth[: len(done)]})

    starts = list(range(len(done), len(units), CHUNK))
    for start in tracked(starts, "Recording", progress and bool(starts)):
        rows = list(units[start : start + CHUNK])
        parts = [_run(run, rows[k : k + batch], len(exits)) for k in range(0, len(rows), batch)]
        arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        with written(_chunk(folder, start)) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        done, chunks = done + digests[start : start + CHUNK], [*chunks, start]
        known = None if truth is None else truth[: len(done)]
        _write_index(index, {**about, "data": done, "labels": known, "chunks": chunks})
    if not done:
        raise ValueError("a recording needs data: expected units, got none")
    return load(folder, model=model)


def load(folder: str | os.PathLike[str], *, model: Any = None) -> Recording:
    """Read a recording.

    Parameters
    ----------
    folder : path
        What :func:`record` wrote.
    model : nn.Module, optional
        The model that it has to belong to.

    Raises
    ------
    ValueError
        One sentence, if there is none, it is damaged, or it was made of another model.

    Examples
    --------
    >>> import tempfile, torch
    >>> from exeunt.evaluation import load, record
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = record(lambda u: torch.zeros(len(u), 3, 2), ["a"], folder, exits=[0, 4], layers=6, progress=False)
    ...     load(folder).exits
    (0, 4)
    """
    folder = Path(folder)
    found = _index(folder)
    if model is not None:
        _refuse_other(folder, found, {"model": of_model(model)})
    parts = []
    for start in found["chunks"]:
        try:
            with np.load(_chunk(folder, start)) as chunk:
                parts.append({name: chunk[name] for name in chunk.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as damaged:
            raise ValueError(f"{folder} is a damaged recording: {_chunk(folder, start).name}: {damaged}") from damaged
    names = set(parts[0])
    if any(set(p) != names for p in parts):
        raise ValueError(f"{folder} is a recording whose parts hold different things: record it afresh")
    arrays = {name: torch.from_numpy(np.concatenate([p[name] for p in parts])) for name in names}
    return Recording(
        exits=tuple(found["exits"]),
        layers=found["layers"],
        classes=int(arrays.pop("classes")[0]),
        statistics=arrays.pop("statistics"),
        predicted=arrays.pop("predicted"),
        logits=arrays.pop("logits", None),
        labels=None if found["labels"] is None else torch.tensor(found["labels"]),
        measures={name.removeprefix("measure "): scores for name, scores in arrays.items()},
        about={name: found[name] for name in ("model", "heads", "data")},
    )


def of_model(model: Any) -> dict[str, Any]:
    """What a recording remembers of its model."""
    return fingerprints.of_model(model)


@torch.no_grad()
def _run(run: Run, rows: list[Any], exits: int) -> dict[str, np.ndarray]:
    """Arrays of one batch."""
    got = run(rows)
    logits, measures = got if isinstance(got, tuple) else (got, {})
    if logits.dim() != 3 or logits.shape[:2] != (len(rows), exits + 1):
        raise ValueError(
            f"run must return logits [{len(rows)}, {exits + 1}, classes] for {len(rows)} units and {exits} exits, "
            f"got {list(logits.shape)}"
        )
    part = Recording.of_logits(logits, measures=measures)
    arrays = {
        "statistics": part.statistics,
        "predicted": part.predicted,
        "classes": torch.full((len(rows),), part.classes),
        **({} if part.logits is None else {"logits": part.logits}),
        **{f"measure {name}": scores for name, scores in part.measures.items()},
    }
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def _index(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "recording.json").read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in FORMAT.items()):
        raise ValueError(f"{folder} holds no exeunt recording of version {FORMAT['version']}")
    return found


def _refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = {"model": "another model", "heads": "other exit heads", "layers": "a model of other depth"}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds a recording of {names.get(name, f'other {name}')}: expected {value}, "
                f"got {found.get(name)}"
            )


def _agreed(folder: Path, known: list[int] | None, given: list[int] | None, units: int) -> list[int] | None:
    """Labels of all units: those that are known and those that are given, which must not differ."""
    if known is None or given is None:
        if known is not None and units > len(known):
            raise ValueError(f"{folder} holds a recording with labels: expected {units} labels for its units, got none")
        return known if given is None else given
    differing = [i for i, (a, b) in enumerate(zip(known, given, strict=False)) if a != b]
    if differing:
        i = differing[0]
        raise ValueError(
            f"{folder} holds a recording with other labels: expected {known[i]} for unit {i}, got {given[i]}"
        )
    return given


def _write_index(index: Path, content: dict[str, Any]) -> None:
    with written(index) as unfinished:
        unfinished.write_text(json.dumps(content))


def _chunk(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:07d}.npz"
