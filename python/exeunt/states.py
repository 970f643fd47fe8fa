"""State strategies: what the layers that a token skipped remember of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from exeunt.models import KeyValues, LayerCall

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer
    from exeunt.generation import GenerationState
    from exeunt.step import Step

__all__ = ["Defer", "Drop", "Evict", "Freeze", "Propagate", "Recompute", "TokenState"]


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
    packed : bool, default False
        Fill in from a copy of the key and value projections that memory serves faster (CPU; :class:`exeunt.ops.KVStack`
        has its size as ``nbytes``): the same bits, in 0.8 to 0.9 of the time of one row. It is made anew when the
        model's weights change.

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.calm(exits=[4], threshold=0.9).state
    Propagate(lazy=False, limit=32, packed=False)
    """

    lazy: bool = False
    limit: int = 32
    packed: bool = False

    def __post_init__(self) -> None:
        _check_limit(self)

    def skip(self, layer: ExitCacheLayer, index: int, call: LayerCall, step: Step) -> None:
        """Rows of a step that left skip layer ``index``, as the model would have called it."""
        assert step.left is not None
        layer.owe(step.token, call, step.left)

    def overdue(self, state: GenerationState) -> bool:
        """Whether what skipped layers lack is to be made up for at the end of a step."""
        return bool(state.pending) and (not self.lazy or state.waiting > self.limit)

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


@dataclass(frozen=True)
class Defer:
    """FREE's synchronised parallel decoding: tokens that left wait, and run along with the next that goes deeper.

    A token waits in the state in which it left. When a later token of its row runs a layer that it skipped, it runs
    that layer beside it (Bae et al. 2023, section 3.3), with any number of exits. So whoever attends at a layer finds
    the keys and values of a model without exits, and a token that goes deep gives that model's own output.

    Parameters
    ----------
    limit : int, default 32
        Tokens of a row that may wait; one more and all run to the end. (The released code has no bound.)

    Examples
    --------
    >>> import exeunt
    >>> exeunt.recipes.free(5).state
    Defer(limit=32)
    """

    limit: int = 32
    again = False  # tokens that wait go on where they left

    def __post_init__(self) -> None:
        _check_limit(self)

    def skip(self, layer: ExitCacheLayer, index: int, call: LayerCall, step: Step) -> None:
        """Rows of a step that left skip layer ``index``, as the model would have called it."""
        assert step.state.deferred is not None
        step.state.deferred.note(step.length, index, call)
        layer.pass_by(step.length)

    def overdue(self, state: GenerationState) -> bool:
        """Whether what skipped layers lack is to be made up for at the end of a step."""
        return state.waiting > self.limit


@dataclass(frozen=True)
class Recompute(Defer):
    """EE-LLM's recomputation: tokens that left run again from the first layer, beside every later token.

    The same keys and values as :class:`Defer` for more work: nothing of a token is kept but its words, so that with
    every step all that wait run as far as the step goes (Chen et al. 2024, "KV recomputation"). For comparison.

    Parameters
    ----------
    limit : int, default 32
        Tokens of a row that may wait; one more and all run to the end. (The released code has its bound commented out.)

    Examples
    --------
    >>> from exeunt.states import Recompute
    >>> Recompute(limit=8)
    Recompute(limit=8)
    """

    again = True


@dataclass(frozen=True)
class Evict:
    """D-LLM's eviction: a layer that a token skipped never learns of it, and later tokens attend to one key less.

    No work at all for skipped layers, and the largest deviation from the model at full depth (Jiang et al. 2024;
    ``docs/states.md`` measures it).

    Examples
    --------
    >>> from exeunt.states import Evict
    >>> Evict()
    Evict()
    """

    def skip(self, layer: ExitCacheLayer, index: int, call: LayerCall, step: Step) -> None:
        """Rows of a step that left skip layer ``index``, as the model would have called it."""
        assert step.left is not None
        layer.evict(step.length, step.left)

    def overdue(self, state: GenerationState) -> bool:
        """Whether what skipped layers lack is to be made up for at the end of a step: never."""
        return False


#: What the skipped layers of a language model remember of its tokens.
TokenState = Propagate | Defer | Evict


def _check_limit(state: Propagate | Defer) -> None:
    if state.limit < 1:
        raise ValueError(f"{type(state).__name__}: limit must be at least 1, got {state.limit}")
