"""State strategies: what the layers that a token skipped remember of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from exeunt.models import KeyValues, LayerCall

__all__ = ["Propagate"]


@dataclass(frozen=True)
class Propagate:
    """CALM's state propagation: a skipped layer sees the state in which the token left.

    Keys and values come from the stock layer's own norm, projections and rotary embedding, applied to the exit
    state; attention and MLP of the layer are not run for that row (Schuster et al. 2022, section 3.2).

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.calm(exits=[4], threshold=0.9).state
    Propagate()
    """

    def fill(self, call: LayerCall, rows: Tensor | None) -> KeyValues:
        """Keys and values of a skipped layer for rows that have left.

        Parameters
        ----------
        call : LayerCall
            The stock layer with this step's arguments; its hidden rows hold the exit states.
        rows : Tensor or None
            [n] indices of the rows, None for all of the batch.

        Returns
        -------
        KeyValues
            Keys and values, each [n, Hkv, 1, Dh].
        """
        return call.capture(rows)
