"""Hidden states of a frozen model, recorded once and read many times.

Running the model is what costs: the heads of its exits are trained on states that lie on disk. They are written in
chunks, each as a whole, so that a recording that was killed goes on behind its last chunk; and read memory-mapped, so
that they may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exeunt.files import written
from exeunt.heads import fingerprint
from exeunt.models import discover
from exeunt.training.loop import digest, processes
from exeunt.training.modules import check_exits, watch
from exeunt.training.text import take

__all__ = ["Recording", "record", "weights_digest"]

CHUNK = 64  # sequences of a file


class Recording:
    """Recorded states: ``len(recording)`` tokens, read by index.

    Attributes
    ----------
    exits : list of int
        0-based layers that are read, of those that were recorded.
    length : int
        Tokens of a sequence; the tokens of sequence k are ``k * length`` to ``(k + 1) * length - 1``.
    about : dict
        Fingerprints of model and data.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import record
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recording = record(model, torch.randint(64, (3, 9)), [1], folder, progress=False)
    ...     states, labels = recording.batches(6)(0)  # the batch of step 0
    >>> states.shape, labels.shape
    (torch.Size([6, 2, 32]), torch.Size([6]))
    """

    def __init__(self, folder: Path, about: dict[str, Any], exits: Iterable[int]) -> None:
        self.about, self.exits, self.length = about, list(exits), int(about["length"])
        self._places = [about["exits"].index(exit) for exit in self.exits] + [-1]
        files = [_chunk(folder, k) for k in range(-(-about["rows"] // CHUNK))]
        self._states = [np.load(file, mmap_mode="r") for file in files]
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")
        self._dtype = getattr(torch, about["dtype"])

    def __len__(self) -> int:
        return int(self.about["rows"]) * self.length

    def read(self, index: Any) -> tuple[Tensor, Tensor]:
        """States [n, exits + 1, D], of which the last is what the model's head reads, and labels [n] of n tokens."""
        index = np.asarray(index)
        chunk, place = np.divmod(index, CHUNK * self.length)
        first = self._states[0]
        states = np.empty((len(index), len(self._places), first.shape[2]), first.dtype)
        for k in np.unique(chunk):
            here = chunk == k
            states[here] = self._states[k][place[here]][:, self._places]
        return torch.from_numpy(states).view(self._dtype), torch.from_numpy(self._labels[index].astype(np.int64))

    def batches(self, batch: int, seed: int = 0, whole: bool = False) -> Any:
        """A function for `fit`: the shuffled batch of a step.

        Parameters
        ----------
        batch : int
            Tokens of a step.
        seed : int, default 0
        whole : bool, default False
            As many whole sequences as fit into it, at least one, instead of tokens out of anywhere.
        """
        size = self.length if whole else 1
        count, some = len(self) // size, max(1, batch // size)
        if count < some:
            raise ValueError(f"the data is too short: a batch has {some * size} tokens, got {len(self)}")

        def read(step: int) -> tuple[Tensor, Tensor]:
            index = np.array([k for _, k in take(count, step * some, some, seed)])
            return self.read((index[:, None] * size + np.arange(size)).ravel())

        return read


def record(
    model: Any,
    rows: Any,
    exits: Iterable[int],
    folder: str | os.PathLike[str],
    *,
    batch: int = 8,
    progress: bool = True,
) -> Recording:
    """Run a frozen causal language model over text and keep its states, or read what was kept.

    Several processes started by torchrun share the work.

    Parameters
    ----------
    model : transformers model for causal language modelling
        States are kept in its dtype: bfloat16 halves the time and the size.
    rows : array
        [R, S + 1] token ids: S are read, and S predicted.
    exits : iterable of int
        0-based layers after which states are kept, beside what the head reads at full depth. A folder may hold more.
    folder : path
        2 * (exits + 1) * D bytes for a token in bfloat16.
    batch : int, default 8
        Sequences run together.
    progress : bool, default True

    Returns
    -------
    Recording

    Raises
    ------
    ValueError
        If the folder holds states of another model or other text, or lacks some of the exits.
    OSError
        If a chunk cannot be written; those before it are kept.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import record
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     states = record(model, torch.randint(64, (3, 9)), [1, 2], folder, progress=False)
    ...     len(states), states.read([0, 5])[0].shape
    (24, torch.Size([2, 3, 32]))
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"the data is too short: expected rows of at least 2 tokens, got shape {list(rows.shape)}")
    structure = discover(model).trainable()
    exits = check_exits(exits, len(structure.layers))
    weight = structure.weight
    about = {
        "model": fingerprint(model.config) | {"weights": weights_digest(model)},
        "data": digest(np.ascontiguousarray(rows, np.int64)),
        "exits": list(exits),
        "length": rows.shape[1] - 1,
        "rows": len(rows),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "recording.json"
    rank, world, wait = processes()
    if rank == 0 and not index.exists():
        with written(folder / "labels.npy") as unfinished, open(unfinished, "wb") as file:
            np.save(file, rows[:, 1:].ravel())
        with written(index) as unfinished:
            unfinished.write_text(json.dumps(about))
    wait()
    found = json.loads(index.read_text())
    if set(exits) < set(found["exits"]):
        about["exits"] = found["exits"]
    names = {"model": "another model", "data": "other text"}
    for name, value in about.items():
        if found.get(name) != value:
            what = names.get(name, f"other {name}")
            raise ValueError(f"{folder} holds states of {what}: expected {value}, got {found.get(name)}")

    own = range(0, len(rows), CHUNK)[rank::world]
    starts = [k for k in own if not _chunk(folder, k // CHUNK).exists()]
    for start in tracked(starts, "Recording", progress and rank == 0 and bool(starts)):
        ids = torch.from_numpy(rows[start : start + CHUNK, :-1].astype(np.int64)).to(weight.device)
        states = torch.cat([_states(model, structure, about["exits"], part) for part in ids.split(batch)])
        plain = states.view(torch.int16) if states.dtype == torch.bfloat16 else states
        with written(_chunk(folder, start // CHUNK)) as unfinished, open(unfinished, "wb") as file:
            np.save(file, plain.numpy())
    wait()
    return Recording(folder, about, exits)


@torch.no_grad()
def _states(model: Any, structure: Any, exits: Iterable[int], ids: Tensor) -> Tensor:
    with watch(structure, exits) as states:
        last = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return torch.stack([*(states[e] for e in exits), last], dim=2).flatten(0, 1).cpu()


def _chunk(folder: Path, k: int) -> Path:
    return folder / f"states-{k:05d}.npy"


def tracked(things: list[int], title: str, progress: bool) -> Iterable[int]:
    """The things, with a progress bar on a terminal."""
    if not progress:
        return things
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(things, title, console=console, disable=not console.is_terminal)


def weights_digest(model: Any) -> str:
    """Fingerprint of a model's parameters: 16 hexadecimal digits.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training.recording import weights_digest
    >>> layer = torch.nn.Linear(4, 2)
    >>> before = weights_digest(layer)
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> len(before), weights_digest(layer) == before
    (16, False)
    """
    plain = (p.detach().cpu().contiguous().flatten() for p in model.parameters())
    return digest(*(p.view(torch.uint8).numpy() for p in plain))
