"""CATs' meta classifier: whether an exit agrees with full depth, judged by what it and the exits before it say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exeunt.confidence import Confidence, ExitPoint

if TYPE_CHECKING:
    from exeunt.classifier_heads.base import Judged, View

__all__ = ["META", "MetaProbe"]


class MetaProbe(nn.Module):
    """Probability that the exit predicts what full depth will (CATs, Schuster et al. 2021).

    Reads the predicted class (one-hot), the head's features, the largest probability, the margin, the probabilities
    that earlier exits gave to this class (latest first, zeros where there are none yet) and how deep the exit lies:
    linear, tanh, linear. The history holds every exit before this one; the published code leaves out the first.

    Parameters
    ----------
    classes : int
        2 or more.
    width : int
        Of the head's features.
    history : int
        Earlier exits to remember.
    inner : int, default 32

    Examples
    --------
    >>> import torch
    >>> from exeunt.classifier_heads import MetaProbe
    >>> probe = MetaProbe(classes=3, width=8, history=2)
    >>> probe(torch.zeros(4, probe.inputs)).shape
    torch.Size([4])
    """

    def __init__(self, classes: int, width: int, history: int, inner: int = 32) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"MetaProbe: classes must be 2 or more, got {classes}")
        self.classes, self.width, self.history, self.inner = classes, width, history, inner
        self.inputs = classes + width + 2 + history + 1
        self.down, self.up = nn.Linear(self.inputs, inner), nn.Linear(inner, 2)

    def options(self) -> dict[str, int]:
        """Arguments that build it again."""
        return {"classes": self.classes, "width": self.width, "history": self.history, "inner": self.inner}

    def seen(self, view: View, judged: Judged, depth: float) -> Tensor:
        """[n, inputs] what it reads; remembers the exit's probabilities for later ones.

        Parameters
        ----------
        view, judged
            Of the exit.
        depth : float
            Share of the layers that have run.
        """
        probabilities = judged.logits.float().softmax(-1)
        label = judged.stats.argmax.clamp_min(0)
        earlier = view.memory.get("probabilities")
        n = len(label)
        history = probabilities.new_zeros(n, self.history)
        if earlier is not None:
            own = earlier.gather(2, label[:, None, None].expand(-1, earlier.shape[1], 1))[..., 0].flip(1)
            own = own[:, : self.history]
            history[:, : own.shape[1]] = own
        new = probabilities[:, None]
        view.memory["probabilities"] = new if earlier is None else torch.cat((earlier, new), 1)
        one_hot = torch.nn.functional.one_hot(label, self.classes).to(probabilities)
        stats = judged.stats
        assert judged.features is not None
        said = torch.stack((stats.max_prob, stats.margin), 1)
        return torch.cat((one_hot, judged.features.float(), said, history, said.new_full((n, 1), depth)), 1)

    def logits(self, seen: Tensor) -> Tensor:
        """[n, 2] for disagreement and agreement, for a balanced cross-entropy."""
        return self.up(torch.tanh(self.down(seen.to(self.down.weight.dtype))))

    def forward(self, seen: Tensor) -> Tensor:
        """[n] float32 probability of agreement."""
        return self.logits(seen).float().softmax(-1)[:, 1]


def _meta(point: ExitPoint) -> Tensor:
    probe: Any = getattr(point.head, "meta", None)
    if probe is None:
        raise ValueError("confidence 'meta' needs exit heads with a MetaProbe, got one without")
    return probe(point.hidden)


#: Its answer as a confidence measure, for a recipe's ``confidence``. No function of one exit's logits: like a probe's
#: it is recorded, and there is none for full depth.
META = Confidence("meta", 0.0, 1.0, False, _meta)
