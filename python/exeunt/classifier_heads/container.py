"""The exit heads of a model together, and their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from exeunt import files
from exeunt.classifier_heads.base import ClassifierHead, View, pooled
from exeunt.classifier_heads.kinds import AttentionHead, LinearHead, PoolerHead
from exeunt.classifier_heads.meta import MetaProbe
from exeunt.classifier_heads.past import PastFutureHead, PastMixHead
from exeunt.heads import ExitHead, ExitHeads, Probe, fingerprint

__all__ = ["ClassifierHeads"]

FILE, ABOUT = "exeunt_heads.safetensors", "exeunt_heads.json"
FORMAT, FORMAT_VERSION = "exeunt.classifier_heads", "2"


class ClassifierHeads(ExitHeads):
    """The exit heads of one classifier or regressor, by exit layer: a mapping, as :class:`exeunt.heads.ExitHeads`.

    Parameters
    ----------
    heads : Mapping[int, ClassifierHead]
        Exit layer, 0-based, to its head. One head for several layers, or parts that heads share, stay shared when
        saved and read again.
    metadata : dict of str, optional
        Free text kept with the heads.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import BertConfig
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> config, heads = BertConfig(hidden_size=24), ClassifierHeads({e: LinearHead(24, 2) for e in (1, 3)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     heads.save(folder, config)
    ...     again = ClassifierHeads.load(folder, config)
    >>> list(again), again.classes, bool((again[3].out.weight == heads[3].out.weight).all())
    ([1, 3], 2, True)
    """

    def __init__(self, heads: Mapping[int, ClassifierHead], metadata: dict[str, str] | None = None) -> None:
        wrong = [type(h).__name__ for h in heads.values() if not isinstance(h, ClassifierHead)]
        if wrong:
            raise ValueError(f"ClassifierHeads: expected ClassifierHead for every exit, got {wrong[0]}")
        if len({h.classes for h in heads.values()}) > 1 or not heads:
            counts = sorted({h.classes for h in heads.values()})
            raise ValueError(f"ClassifierHeads: expected heads that agree on the number of labels, got {counts}")
        super().__init__(cast(Mapping[int, ExitHead], heads), metadata)
        first = self[next(iter(self))]
        self.classes, self.pooling = first.classes, first.pooling
        self.observes = any(self[e].observes for e in self)
        self.remembers = any(self[e].remembers for e in self)

    def __getitem__(self, layer: int) -> Any:
        return super().__getitem__(layer)

    def observe(self, view: View) -> None:
        """Remember the pooled state after a layer in ``memory["states"]``, [n, layers so far, D]."""
        state = pooled(view.hidden, view.mask, self.pooling)[:, None]
        before = view.memory.get("states")
        view.memory["states"] = state if before is None else torch.cat((before, state), 1)

    def logits(self, states: list[Tensor], mask: Tensor | None) -> dict[int, Tensor]:
        """Logits [B, C] of all exits from the states [B, S, D] after every layer: for training; differentiable.

        Examples
        --------
        >>> import torch
        >>> heads = ClassifierHeads({1: LinearHead(8, 3)})
        >>> {layer: z.shape for layer, z in heads.logits([torch.randn(2, 5, 8)] * 4, None).items()}
        {1: torch.Size([2, 3])}
        """
        memory: dict[str, Tensor] = {}
        found = {}
        for layer, hidden in enumerate(states):
            view = View(hidden, mask, layer, memory)
            if self.observes:
                self.observe(view)
            if layer in self:
                found[layer] = self[layer](view)
        return found

    def save(self, path: str | os.PathLike[str], config: Any) -> None:
        """Write ``exeunt_heads.safetensors`` and ``exeunt_heads.json`` into a folder, each completely or not at all.

        Parameters
        ----------
        path : path
            Folder, for example that of the model's checkpoint, which stays as it is.
        config : transformers.PretrainedConfig
            Of the encoder that the heads belong to; its fingerprint goes into the JSON file.
        """
        import safetensors.torch

        folder = Path(path)
        tensors: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in self._heads.state_dict(keep_vars=True).items():
            names[name] = next((other for other, t in tensors.items() if t is tensor), name)
            tensors.setdefault(names[name], tensor)
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        content = safetensors.torch.save(plain)
        about = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": fingerprint(config),
            "heads": {str(e): _described(self[e]) for e in self},
            "shared": {name: kept for name, kept in names.items() if name != kept},
            "metadata": self.metadata,
            "digest": _digest(content),
        }
        files.write(folder / FILE, content)
        files.write(folder / ABOUT, json.dumps(about, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any) -> ClassifierHeads:
        """Read heads that :meth:`save` wrote, on the CPU and in their dtypes; ``.to(...)`` moves and casts them.

        Parameters
        ----------
        path : path
            Folder.
        config : transformers.PretrainedConfig
            Of the encoder that the heads are wanted for.

        Raises
        ------
        ValueError
            If there are no heads of this kind, damaged ones, or those of another model: one sentence.
        """
        folder, wanted = Path(path), {"format": FORMAT, "version": FORMAT_VERSION}
        try:
            about = json.loads((folder / ABOUT).read_text())
        except (OSError, ValueError):
            about = None
        if not isinstance(about, dict) or {name: about.get(name) for name in wanted} != wanted:
            raise ValueError(
                f"{folder} holds no exit heads of a classifier of version {FORMAT_VERSION}, expected {FILE} and {ABOUT}"
            )
        got = fingerprint(config)
        try:
            return cls._read(folder, about, got)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # a field is not there, or another thing
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{folder / ABOUT} is damaged: expected the fields that save writes, got {why}") from error

    @classmethod
    def _read(cls, folder: Path, about: dict[str, Any], got: dict[str, Any]) -> ClassifierHeads:
        """The heads that a JSON file describes, for a model of the fingerprint `got`."""
        import safetensors.torch

        expected = about["model"]
        differing = [name for name in expected | got if expected.get(name) != got.get(name)]
        if differing:
            fields = "; ".join(f"{name} {expected.get(name)}, got {got.get(name)}" for name in differing)
            raise ValueError(f"{folder} holds exit heads of another model: expected {fields}")
        content = (folder / FILE).read_bytes() if (folder / FILE).is_file() else None
        if content is None or _digest(content) != about["digest"]:
            what = "none" if content is None else "another or a damaged one"
            raise ValueError(f"{folder}: expected the {FILE} that was saved with its {ABOUT}, got {what}")
        loaded = cls({int(e): _built(parts) for e, parts in about["heads"].items()}, about["metadata"])
        tensors = safetensors.torch.load(content)
        loaded._heads.load_state_dict(
            {**tensors, **{name: tensors[kept] for name, kept in about["shared"].items()}}, assign=True
        )
        for name, kept in about["shared"].items():  # one Parameter, not two of the same values
            where, _, what = name.rpartition(".")
            setattr(loaded._heads.get_submodule(where), what, loaded._heads.get_parameter(kept))
        return loaded


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


KINDS = {k.__name__: k for k in (LinearHead, PoolerHead, AttentionHead, PastMixHead, PastFutureHead)}


def _described(head: ClassifierHead) -> dict[str, Any]:
    own = head.probe
    probe = None if own is None else {"hidden_size": own.hidden_size, "eps": own.eps, "width": own.width}
    meta = None if head.meta is None else head.meta.options()
    return {"kind": type(head).__name__, "options": head.options(), "probe": probe, "meta": meta}


def _built(parts: dict[str, Any]) -> ClassifierHead:
    probe = None if parts["probe"] is None else Probe(**parts["probe"])
    head = KINDS[parts["kind"]](**parts["options"], probe=probe)
    head.meta = None if parts["meta"] is None else MetaProbe(**parts["meta"])
    return head
