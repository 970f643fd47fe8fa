"""State strategies: what the layers that a token skipped remember of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from exeunt.models import KeyValues, LayerCall

__all__ = ["Drop", "Freeze", "Propagate"]


@dataclass(frozen=True)
class Drop:
    """Nothing: skipped layers never see the row again, as in an encoder whose rows leave whole.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.states.Drop()
    Drop()
    """


@dataclass(frozen=True)
class Freeze:
    """The state in which a word of a tagger halted: later layers read keys and values from it (TOKEE).

    Parameters
    ----------
    norm : {"post", "pre"}
        What is frozen: the layer's output, or what its last norm reads, so that each later layer applies its own norm
        to it and the state still changes a little. In models that normalise before their products both are the same.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.states.Freeze("pre")
    Freeze(norm='pre')
    """

    norm: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        if self.norm not in ("post", "pre"):
            raise ValueError(f"Freeze: norm must be 'post' or 'pre', got {self.norm!r}")


@dataclass(frozen=True)
class Propagate:
    """CALM's state propagation: a skipped layer sees the state in which the token left.

    Keys and values come from the stock layer's own norm, projections and rotary embedding, applied to the exit
    state; attention and MLP of the layer are not run for that row (Schuster et al. 2022, section 3.2).

    Parameters
    ----------
    lazy : bool, default False
        Wait until a later token attends at the layer, and fill in all the tokens that wait there in one product: the
        layer's weights are read once for them all, and not at all if no token ever comes. The same keys and values
        as with False, up to the rounding of products of another height.
    limit : int, default 32
        Tokens of a row that may wait; one more and all are filled in.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.calm(exits=[4], threshold=0.9).state
    Propagate(lazy=False, limit=32)
    """

    lazy: bool = False
    limit: int = 32

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"Propagate: limit must be at least 1, got {self.limit}")

    def fill(self, skipped: list[tuple[LayerCall, Tensor]]) -> KeyValues:
        """Keys and values of a skipped layer.

        Parameters
        ----------
        skipped : list of (LayerCall, Tensor)
            Calls of one stock layer, one a token, whose hidden rows hold the exit states; and of each the [n_i]
            indices of the rows to fill in.

        Returns
        -------
        KeyValues
            Keys and values, each [n, Hkv, 1, Dh] with n the sum of the n_i, in the order of the list.
        """
        return LayerCall.join(skipped).capture()
