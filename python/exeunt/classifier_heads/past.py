"""Exit heads that build on what came before, and on what is to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exeunt.classifier_heads.base import ClassifierHead, Judged, View
from exeunt.heads import Probe
from exeunt.stats import ExitStats

__all__ = ["GlobalMaps", "PastFutureHead", "PastMixHead"]


class PastMixHead(ClassifierHead):
    """RightTool's head: a learned mix of the pooled states of all layers so far, beside the logits of earlier exits.

    The mix has unit length. (The published code makes it anew in every forward, so that it is never learned.)
    ``temperature`` divides the logits, and later heads read them divided (Schwartz et al. 2020).

    Parameters
    ----------
    hidden_size, classes, pooling, probe
        As for all heads.
    layers : int
        Layers that have run at this exit: its 0-based layer and one.
    earlier : int
        Exits before this one.

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import ClassifierHeads, PastMixHead
    >>> heads = ClassifierHeads({1: PastMixHead(8, 3, layers=2, earlier=0), 2: PastMixHead(8, 3, layers=3, earlier=1)})
    >>> heads.logits([torch.randn(2, 5, 8)] * 4, None)[2].shape
    torch.Size([2, 3])
    """

    observes = remembers = True

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, layers: int, earlier: int,
        probe: Probe | None = None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, classes, pooling, width=hidden_size + earlier * classes, probe=probe)
        self.layers, self.earlier = layers, earlier
        self.mix = nn.Parameter(torch.ones(layers))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {**super().options(), "layers": self.layers, "earlier": self.earlier}

    def features(self, view: View) -> Tensor:
        """The mix, and the logits of the exits before."""
        mixed = torch.einsum("l,nld->nd", self.mix / self.mix.norm(), view.memory["states"])
        return torch.cat((mixed, view.memory["logits"]), 1) if self.earlier else mixed

    def forward(self, view: View) -> Tensor:
        """Logits [n, C], which later heads will read."""
        return self._remembered(view, super().forward(view) / self.temperature)

    def judge(self, view: View) -> Judged:
        """The same and what there is to know of it, for inference."""
        features = self.features(view)
        logits = self._remembered(view, self.out(features) / self.temperature)
        return Judged(logits, ExitStats.from_logits(logits), features)

    def _remembered(self, view: View, logits: Tensor) -> Tensor:
        before = view.memory.get("logits")
        view.memory["logits"] = logits if before is None else torch.cat((before, logits), 1)
        return logits


class GlobalMaps(nn.Module):
    """What all heads of a model share in global past-future exits: for each layer a map to its state, and its logits.

    Parameters
    ----------
    hidden_size, classes : int
    layers : int
        Depth L of the model.

    Examples
    --------
    >>> from exeunt.classifier_heads import GlobalMaps, PastFutureHead
    >>> maps = GlobalMaps(8, 3, layers=4)
    >>> heads = [PastFutureHead(8, 3, layer=e, layers=4, maps=maps) for e in range(3)]
    >>> heads[0].maps is heads[2].maps, len(maps.future)
    (True, 4)
    """

    def __init__(self, hidden_size: int, classes: int, layers: int) -> None:
        super().__init__()
        self.future = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(hidden_size, 2 * classes) for _ in range(layers))
        self.gate = nn.Linear(classes, 1)


class PastFutureHead(ClassifierHead):
    """Global past-future (Liao et al., NAACL 2021): poolers of the exits so far, and predicted ones of layers to come.

    With c the tanh-pooled state of this exit: every layer j above it is predicted as ``tanh(M_j c)``, and only these
    are computed (the published code computes all L and drops the others: as much work as a layer). Classification parts
    are added up over the past and over the future; a gate on the mean gate part of the past weighs the two sums. The
    sums of the past go along with the row, so that its share does not grow with depth.

    Parameters
    ----------
    hidden_size, classes, pooling, probe
        As for all heads.
    layer, layers : int
        The exit's layer, and the depth of the model.
    maps : GlobalMaps, optional
        One that all heads of the model share.

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import ClassifierHeads, GlobalMaps, PastFutureHead
    >>> maps = GlobalMaps(8, 3, 4)
    >>> heads = ClassifierHeads({e: PastFutureHead(8, 3, layer=e, layers=4, maps=maps) for e in range(3)})
    >>> heads.logits([torch.randn(2, 5, 8)] * 4, None)[2].shape
    torch.Size([2, 3])
    """

    remembers = True

    def __init__(
        self, hidden_size: int, classes: int, pooling: str = "first", *, layer: int, layers: int,
        maps: GlobalMaps | None = None, probe: Probe | None = None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, classes, pooling, probe=probe)
        self.layer, self.layers = layer, layers
        self.out = self.pooler = nn.Linear(hidden_size, hidden_size)
        self.maps = GlobalMaps(hidden_size, classes, layers) if maps is None else maps

    def options(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return {**super().options(), "layer": self.layer, "layers": self.layers}

    def features(self, view: View) -> Tensor:
        """The pooled state of this exit."""
        return torch.tanh(self.pooler(self.pooled(view)))

    def forward(self, view: View) -> Tensor:
        """Logits [n, C]; adds this exit to the past."""
        return self._logits(view, self.features(view))

    def judge(self, view: View) -> Judged:
        """The same and what there is to know of it, for inference."""
        features = self.features(view)
        logits = self._logits(view, features)
        return Judged(logits, ExitStats.from_logits(logits), features)

    def predicted(self, state: Tensor) -> dict[int, Tensor]:
        """[n, D] pooled states of the layers above, by layer, as predicted from this exit's: for the imitation loss."""
        return {j: torch.tanh(self.maps.future[j](state)) for j in range(self.layer + 1, self.layers)}

    def _logits(self, view: View, state: Tensor) -> Tensor:
        own = self.maps.out[self.layer](state)
        memory = view.memory
        memory["past"] = memory["past"] + own if "past" in memory else own
        memory["count"] = memory["count"] + 1 if "count" in memory else own.new_ones(own.shape[0], 1)
        past, gate = memory["past"].chunk(2, 1)
        future = sum(self.maps.out[j](c).chunk(2, 1)[0] for j, c in self.predicted(state).items())
        weight = torch.sigmoid(self.maps.gate(torch.tanh(gate / memory["count"])))
        return 2 * weight * past + (2 - 2 * weight) * future
