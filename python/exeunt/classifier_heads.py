"""Exit heads of classifiers and regressors: logits from the states of a text after some layer.

A head reads what it likes of a `View`: the states of all tokens, the mask, and a memory that goes through the layers
with the row, so that heads can build on the exits before them. All heads end in a linear layer, ``out``, so that logits
and their statistics come from one fused call (:meth:`ClassifierHead.judge`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from exeunt import files, ops
from exeunt.heads import ExitHead, ExitHeads, Probe, fingerprint
from exeunt.stats import ExitStats

__all__ = ["ClassifierHead", "ClassifierHeads", "LinearHead", "PoolerHead", "View"]

FILE, ABOUT = "exeunt_heads.safetensors", "exeunt_heads.json"
FORMAT, FORMAT_VERSION = "exeunt.classifier_heads", "1"


class View(NamedTuple):
    """What an exit head sees of n rows.

    Attributes
    ----------
    hidden : Tensor
        [n, S, D] states of all tokens after the layer.
    mask : Tensor or None
        [n, S], not 0 where a token counts; None where all do.
    layer : int
        0-based.
    memory : dict of str to Tensor
        What heads of earlier layers left of these rows, rows first; to be read and added to.
    """

    hidden: Tensor
    mask: Tensor | None
    layer: int
    memory: dict[str, Tensor]


def pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One state [n, D] for each text: of its first token, or the mean over the tokens that count.

    Examples
    --------
    >>> import torch
    >>> h = torch.tensor([[[1.0], [3.0], [8.0]]])
    >>> pooled(h, torch.tensor([[1, 1, 0]]), "mean"), pooled(h, None, "first")
    (tensor([[2.]]), tensor([[1.]]))
    """
    if pooling == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    weight = (mask != 0).to(hidden.dtype)
    return torch.bmm((weight / weight.sum(1, keepdim=True).clamp_min(1))[:, None], hidden)[:, 0]


class ClassifierHead(nn.Module):
    """What the heads have in common.

    Parameters
    ----------
    hidden_size : int
        Size D of the model's hidden states.
    classes : int
        Logits C; 1 for a regression.
    pooling : {"first", "mean"}
        The state of a text that probes, saturation and most heads read: of the first token, or the mean over tokens.
    width : int, optional
        Size of what ``out`` reads; default D.
    probe : Probe, optional
        Of this exit's own.
    """

    translator = None
    observes = False  # whether the head has to see every layer

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, width: int | None = None,
        probe: Probe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be 'first' or 'mean', got {pooling!r}")
        if classes < 1:
            raise ValueError(f"classes must be 1 or more, got {classes}")
        self.hidden_size, self.classes, self.pooling = hidden_size, classes, pooling
        self.out = nn.Linear(width or hidden_size, classes)
        self.probe = probe

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {"hidden_size": self.hidden_size, "classes": self.classes, "pooling": self.pooling}

    def pooled(self, view: View) -> Tensor:
        """[n, D] states of the texts."""
        return pooled(view.hidden, view.mask, self.pooling)

    def features(self, view: View) -> Tensor:
        """What ``out`` reads, [n, width]; differentiable."""
        raise NotImplementedError

    def forward(self, view: View) -> Tensor:
        """Logits [n, C]; differentiable."""
        return self.out(self.features(view))

    def judge(self, view: View) -> tuple[Tensor, ExitStats]:
        """Logits [n, C] and their statistics, for inference."""
        features = self.features(view)
        logits = features.new_empty(features.shape[0], self.classes)
        stats = ops.exit_stats(features, self.out.weight, head_bias=self.out.bias, logits_out=logits)
        return logits, stats


class LinearHead(ClassifierHead):
    """One linear layer on the pooled state (SDN, BERxiT, CALM's setting for classifiers).

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import LinearHead, View
    >>> LinearHead(8, 3)(View(torch.randn(2, 5, 8), None, 0, {})).shape
    torch.Size([2, 3])
    """

    def features(self, view: View) -> Tensor:
        """The pooled state."""
        return self.pooled(view)


class PoolerHead(ClassifierHead):
    """A pooler (D to D, tanh) and a linear layer: DeeBERT's off-ramp; with a shared pooler, PABEE's head.

    Parameters
    ----------
    hidden_size, classes, pooling, probe
        As for all heads.
    pooler : nn.Linear, optional
        One that several heads share; by default the head has its own.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from exeunt.classifier_heads import ClassifierHeads, PoolerHead, View
    >>> shared = nn.Linear(8, 8)
    >>> heads = ClassifierHeads({layer: PoolerHead(8, 3, pooler=shared) for layer in (0, 1)})
    >>> heads[0](View(torch.randn(2, 5, 8), None, 0, {})).shape, heads[0].pooler is heads[1].pooler
    (torch.Size([2, 3]), True)
    """

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, pooler: nn.Linear | None = None,
        probe: Probe | None = None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, classes, pooling, probe=probe)
        self.pooler = nn.Linear(hidden_size, hidden_size) if pooler is None else pooler

    def features(self, view: View) -> Tensor:
        """The pooler's output."""
        return torch.tanh(self.pooler(self.pooled(view)))


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
        about = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": fingerprint(config),
            "heads": {str(e): _described(self[e]) for e in self},
            "shared": {name: kept for name, kept in names.items() if name != kept},
            "metadata": self.metadata,
        }
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        files.write(folder / FILE, safetensors.torch.save(plain))
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
            If there are no heads of this kind, or those of another model: one sentence.
        """
        import safetensors.torch

        folder = Path(path)
        try:
            about = json.loads((folder / ABOUT).read_text())
        except (OSError, ValueError):
            about = {}
        if (about.get("format"), about.get("version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{folder} holds no exit heads of a classifier, expected {FILE} and {ABOUT}")
        expected, got = about["model"], fingerprint(config)
        differing = [name for name in expected | got if expected.get(name) != got.get(name)]
        if differing:
            fields = "; ".join(f"{name} {expected.get(name)}, got {got.get(name)}" for name in differing)
            raise ValueError(f"{folder} holds exit heads of another model: expected {fields}")
        loaded = cls({int(e): _built(parts) for e, parts in about["heads"].items()}, about["metadata"])
        tensors = safetensors.torch.load_file(folder / FILE)
        loaded._heads.load_state_dict(
            {**tensors, **{name: tensors[kept] for name, kept in about["shared"].items()}}, assign=True
        )
        for name, kept in about["shared"].items():  # one Parameter, not two of the same values
            where, _, what = name.rpartition(".")
            setattr(loaded._heads.get_submodule(where), what, loaded._heads.get_parameter(kept))
        return loaded


KINDS = {kind.__name__: kind for kind in (LinearHead, PoolerHead)}


def _described(head: ClassifierHead) -> dict[str, Any]:
    probe = None if head.probe is None else {"hidden_size": head.probe.hidden_size, "eps": head.probe.eps}
    return {"kind": type(head).__name__, "options": head.options(), "probe": probe}


def _built(parts: dict[str, Any]) -> ClassifierHead:
    probe = None if parts["probe"] is None else Probe(**parts["probe"])
    return KINDS[parts["kind"]](**parts["options"], probe=probe)
