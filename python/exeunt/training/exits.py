"""Training the exits of a causal language model, from its text to a file of exit heads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exeunt import files
from exeunt.calibration.fingerprints import sketch
from exeunt.heads import DecoderLayer, ExitHead, ExitHeads, Probe, Translator
from exeunt.models import discover
from exeunt.training.history import TRAINING_FILE, history
from exeunt.training.loop import adamw, digest, fit, muon, processes
from exeunt.training.measures import judge, summary
from exeunt.training.modules import Joint, Recorded, check_exits, select
from exeunt.training.objectives import parse
from exeunt.training.recording import Recording, record, weights_digest
from exeunt.training.terms import ProbeLoss
from exeunt.training.text import Windows

__all__ = ["HEADS_FILE", "train_exits"]

HEADS_FILE = "exits.safetensors"


def train_exits(
    model: Any,
    rows: Any,
    exits: Iterable[int],
    objective: str,
    out: str | os.PathLike[str],
    *,
    held_out: Mapping[str, Any],
    which: str = "heads",
    head: str = "translator",
    sample: int | None = None,
    steps: int = 1500,
    batch: int = 512,
    learning_rate: float | None = None,
    bf16: bool = False,
    seed: int = 0,
    tokenizer: Any = None,
    about: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ExitHeads:
    """Train exits and write them, with what they were trained on and how well they do, into a folder.

    Called again with the same arguments it goes on where it was stopped; where the model is trained in place, load it
    again first: one that has been trained is another model. Several processes started by torchrun record and train
    together.

    Parameters
    ----------
    model : transformers model for causal language modelling
        Left frozen with ``which="heads"``, trained in place otherwise.
    rows : array
        [R, S + 1] token ids to train on.
    exits : iterable of int
        0-based layers.
    objective : str
        As `parse` reads it, for example ``"kl + probe"``.
    out : path
        Folder; gets ``exits.safetensors`` and, where the model was trained, ``model/``, which says in
        ``training.json`` on what. The checkpoint and the recorded states (``states/``, which may be deleted afterwards)
        lie there as well.
    held_out : Mapping[str, array]
        By name, rows like `rows` to measure on.
    which : str, default "heads"
        ``heads``: a translator and, where the objective trains one, a probe for each exit, on recorded states.
        ``last-K`` or ``all``: the last K layers or the whole model as well, on tokens; exits then use the model's head
        without translators.
    head : str, default "translator"
        What each exit gets with ``which="heads"``: ``translator``, or ``layer``, a `DecoderLayer` of its own (Balcony's
        exits), trained on whole sequences, which `attach` refuses.
    sample : int, optional
        Tokens of the vocabulary that a step reads beside likely ones (`Objective`); by default all. With a large
        vocabulary, reading it is nearly all that a step does; full depth still reads all of it once.
    steps : int, default 1500
    batch : int, default 512
        Tokens of a step.
    learning_rate : float, optional
        Its peak. Default: 0.01 for heads, 0.0003 for a model.
    bf16 : bool, default False
        Train the model in bfloat16 (autocast); heads alone follow the dtype of their model.
    seed : int, default 0
    tokenizer : transformers tokenizer, optional
        Saved beside a model that was trained.
    about : Mapping[str, str], optional
        Kept with the heads, such as the licence of the data.
    progress : bool, default True

    Returns
    -------
    ExitHeads
        As stored, their measures in ``metadata["held_out"]``.

    Raises
    ------
    ValueError
        At exits out of range, an unknown objective, a learning rate that is not positive, too little data, or a folder
        of another run: one sentence.
    FloatingPointError
        At a loss that is not finite.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import train_exits
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> rows = torch.randint(64, (12, 9)).numpy()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     heads = train_exits(model, rows[2:], [1, 2], "kl + probe", folder, held_out={"held_out": rows[:2]}, steps=3,
    ...                         batch=16, progress=False)
    >>> list(heads), heads.metadata["steps"]
    ([1, 2], '3')
    """
    structure = discover(model).trainable()
    exits = check_exits(exits, len(structure.layers))
    if head not in ("translator", "layer"):
        raise ValueError(f"head must be translator or layer, got {head!r}")
    goal = parse(objective, [*exits, len(structure.layers) - 1], sample)
    frozen = which == "heads"
    rate = (1e-2 if frozen else 3e-4) if learning_rate is None else learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"learning_rate must be larger than 0 and finite, got {rate:g}")
    rows, out = np.asarray(rows), Path(out)
    if not len(rows) or not held_out or not all(len(r) for r in held_out.values()):
        raise ValueError("the data is too short: there must be rows to train on and held-out ones")
    out.mkdir(parents=True, exist_ok=True)
    rank, _, wait = processes()
    first = rank == 0
    torch.manual_seed(seed)
    probes = any(isinstance(term, ProbeLoss) for term in goal.terms)
    heads = ExitHeads({e: _head(model.config, head if frozen else None, probes) for e in exits})
    identity = {
        "model": weights_digest(model),
        "data": digest(np.ascontiguousarray(rows, np.int64)),
        "exits": list(exits),
        "objective": objective,
        "train": which,
        "head": head,
        "sample": sample,
        "batch": batch,
        "learning_rate": rate,
        "bf16": bf16,
    }
    common: Any = {"steps": steps, "identity": identity, "seed": seed, "progress": progress}
    if frozen:
        model.requires_grad_(False)
        states = record(model, rows, exits, out / "states" / "train", progress=progress)
        recorded = Recorded(structure, heads, goal, states.length if head == "layer" else 1)
        batches = states.batches(batch, seed, whole=head == "layer")
        outcome = fit(recorded, batches, out / "checkpoint", optimizers=adamw(recorded, rate), **common)
        heads.to(structure.weight)
        unseen = {name: record(model, some, exits, out / "states" / name, progress=progress)
                  for name, some in held_out.items()}  # fmt: skip
        measured = {name: _measured(recorded, some) for name, some in unseen.items()} if first else {}
    else:
        length = rows.shape[1] - 1
        joint = Joint(model, exits, goal, heads, bf16)
        select(joint, which)
        windows = Windows(rows[:, :-1].ravel(), length, max(1, batch // length), seed)
        optimizers = muon(joint, rate) if which == "all" else adamw(joint, rate)
        outcome = fit(joint, windows, out / "checkpoint", optimizers=optimizers, **common)
        measured = {name: _measured_joint(joint, some) for name, some in held_out.items()} if first else {}
    heads.metadata = {
        **(about or {}),
        **{name: str(value) for name, value in identity.items()},
        "steps": str(outcome["steps"]),
        "seed": str(seed),
        "seconds": f"{outcome['seconds']:.0f}",
        "tokens": str(rows.shape[0] * (rows.shape[1] - 1)),
        "held_out": json.dumps(measured),
        "sketch": sketch(rows),
    }
    if first:
        if not frozen:
            _save(model, tokenizer, heads.metadata, out / "model")
        heads.save(out / HEADS_FILE, model.config)
    wait()
    return heads if first else ExitHeads.load(out / HEADS_FILE, model.config).to(structure.weight)


def _save(model: Any, tokenizer: Any, about: dict[str, str], folder: Path) -> None:
    """The trained model; what it was trained on comes first, so that no model lies there which does not say so."""
    folder.mkdir(exist_ok=True)
    before = history(model)
    content = {**about, "before": before} if before else about
    files.write(folder / TRAINING_FILE, json.dumps(content, indent=1).encode())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _head(config: Any, kind: str | None, probe: bool) -> ExitHead:
    width = config.hidden_size
    if kind == "layer":
        layer = DecoderLayer(
            width,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None),
            getattr(config, "intermediate_size", None),
        )
        return ExitHead(probe=Probe(width) if probe else None, layer=layer)
    return ExitHead(Translator(width) if kind else None, Probe(width) if probe else None)


@torch.no_grad()
def _measured(recorded: Recorded, states: Recording) -> dict[str, Any]:
    device = recorded.structure.weight.device
    some = max(1, 4096 // states.length) * states.length  # whole sequences
    parts = (states.read(range(k, min(k + some, len(states)))) for k in range(0, len(states), some))
    return summary(judge(recorded.depths(h.to(device)), y.to(device), recorded.heads) for h, y in parts)


@torch.no_grad()
def _measured_joint(joint: Joint, rows: Any) -> dict[str, Any]:
    device = joint.structure.weight.device
    parts = torch.from_numpy(np.asarray(rows, np.int64)).to(device).split(8)
    return summary(judge(joint.depths(ids[:, :-1]), ids[:, 1:].flatten(), joint.heads) for ids in parts)
