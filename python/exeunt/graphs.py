"""A decoding step as CUDA graphs: one for each segment of layers between exits and each bucket of rows.

What is in a graph and what is not, for exits after layers 8 and 16::

    embedding, masks, rotary tables   the model's own, as ever
    layers 0 .. 8                     note their arguments and pass the hidden state on; the last of them copies rows
                                      and arguments into the graph's own tensors, and replays it: one launch for all
    exit 8                            the check as ever, on the rows that run; the host reads how many stay
    layers 9 .. 16                    another graph, for the bucket of that number: 1, 2, 4, ... or the whole batch
    skipped layers                    kv_fill, as ever

The host knows how many rows run, so only the layers are padded. Rows of padding repeat row 0 and write their keys and
values to a place of the cache that no token has. A graph is tied to addresses, so each is tied to a :class:`_Store`:
the tensors of a cache that a generation moves into, and leaves for the next one.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from exeunt.models import KeyValues, LayerCall, RowTaker, Structure, attention, stand_in
from exeunt.recorder import Recorder, Unrecordable, reads_on_host, recorder_for
from exeunt.states import Propagate

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer
    from exeunt.recipes import Recipe
    from exeunt.step import Step

__all__ = ["Graphs"]

_STORES = 4  # caches whose tensors and graphs are kept
_PIECES = 256  # graphs of a store; more means that something differs in every step
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


class Graphs:
    """Runs the segments of an attached model's decoding steps as graphs.

    Parameters
    ----------
    structure : Structure
        The model's parts.
    recipe : Recipe
        What decides, and what becomes of skipped layers.
    recorder : Recorder
        What records a graph.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.graphs import Graphs
    >>> from exeunt.models import discover
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> Graphs.of(discover(model), exeunt.recipes.calm([1])) is None  # on the CPU
    True
    """

    def __init__(self, structure: Structure, recipe: Recipe, recorder: Recorder) -> None:
        self._structure, self._recorder = structure, recorder
        self._config = structure.model.config.get_text_config(decoder=True)
        self._refused = self._unable(structure, recipe)
        self._watched: _Watched | None = None
        self._stores: list[_Store] = []
        self._rest: tuple[None, ...] | None = None
        self._lock = threading.Lock()  # the graphs share one memory pool

    @staticmethod
    def of(structure: Structure, recipe: Recipe) -> Graphs | None:
        """For a model on a device that has graphs; None elsewhere."""
        recorder = recorder_for(structure.weight.device)
        return None if recorder is None else Graphs(structure, recipe, recorder)

    @staticmethod
    def _unable(structure: Structure, recipe: Recipe) -> str | None:
        """Why no step of this model and recipe can be in graphs, if so."""
        if not isinstance(recipe.state, Propagate):
            return f"the state strategy {type(recipe.state).__name__}"
        if structure.model.config.is_encoder_decoder:
            return "an encoder-decoder"
        if structure.batched:
            return f"layers that take {', '.join(structure.batched)} of another first dimension than the batch"
        if {t.device for layer in structure.layers for t in layer.parameters()} != {structure.weight.device}:
            return "layers on several devices"
        return None

    def prompt(self, out: Any) -> None:
        """What a stock layer returned at full depth: layers that only pass the state on return the same form."""
        rest = out[1:] if isinstance(out, tuple) else None
        if rest is not None and any(part is not None for part in rest):
            self._refused = self._refused or "layers that return more than their output"
        else:
            self._rest = rest

    def like(self, hidden: Tensor) -> Any:
        """A layer's output in the form of the stock layers'."""
        return hidden if self._rest is None else (hidden, *self._rest)

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        self._recorder.wait()
        self._stores, self._watched = [], None

    def ready(self, step: Step, asked: str | None) -> bool:
        """Whether a step that begins runs in graphs; counted with the reason, where it does not.

        ``asked``: the option by which the model is to return what every layer gives, if it is.
        """
        reason = self._refused or asked or self._unready()
        if reason is not None:
            step.report.graphs[f"eager steps: {reason}"] += 1
            return False
        with self._lock:
            if self._watched is None or not self._watched.same():
                if self._watched is not None:
                    step.report.graphs["weights replaced: recorded anew"] += 1
                    self._recorder.wait()
                self._watched = _Watched(self._structure.layers)
                for store in self._stores:
                    store.pieces.clear()
        return True

    def _unready(self) -> str | None:
        """Why a step that begins now cannot be in graphs, if so."""
        if torch.is_autocast_enabled(self._structure.weight.device.type):
            return "autocast"
        if torch.compiler.is_compiling():
            return "torch.compile"
        layers = self._structure.layers
        if any(m._forward_hooks or m._forward_pre_hooks for layer in layers for m in layer.modules()):
            return "hooks on the layers"
        return None

    def _moved_in(self, step: Step) -> _Store:
        """The store that a step's cache lies in, with room for its token."""
        layers, need = step.cache.layers, step.length + 1
        for store in self._stores:
            if store.capacity >= need and store.holds(layers):
                return store
        need = max(need, step.state.max_length or 0)
        free = next((s for s in self._stores if s.fits(layers, need) and s.free), None)
        if free is None:
            free = _Store(layers, max(64, 1 << (need - 1).bit_length()))
            self._stores.append(free)
            if len(self._stores) > _STORES:
                self._recorder.wait()
                del self._stores[0]
        free.take(layers)
        return free

    def run(self, first: int, calls: list[LayerCall], step: Step) -> tuple[Tensor, Tensor] | None:
        """Run the layers from ``first`` on, one for each of ``calls``, for the rows of a step that run.

        Returns the last layer's input and output [B, 1, D], other rows as they were; None if these layers cannot be in
        a graph, which is noted: then the caller runs them.
        """
        rows, count = step.running_rows, step.running
        with self._lock:
            self._recorder.follow()
            store = self._moved_in(step)
            try:
                given = _Given(calls, rows, first, step, store)
                bucket = min(1 << (count - 1).bit_length(), step.batch)
                key = (first, bucket, *given.form)
                piece = store.pieces.get(key)
                if piece is None:
                    if len(store.pieces) >= _PIECES:
                        self._recorder.wait()
                        store.pieces.clear()
                    piece = _Piece(given, bucket, first, store)
                    piece.load(given)
                    with _Watching():
                        served = self._counted(lambda: self._recorder.run(piece.body))
                    piece.served = served
                    store.pieces[key] = piece
                    step.report.graphs["segments run before they are recorded"] += 1
                else:
                    piece.load(given)
                    if piece.replay is None:
                        self._counted(lambda: setattr(piece, "replay", self._recorder.record(piece.body)))
                        step.report.graphs["recorded"] += 1
                    self._recorder.replay(piece.replay)
                    step.report.graphs["replayed"] += 1
                step.report.attention.update(piece.served)
            except Unrecordable as reason:
                self._refused = str(reason)
                step.report.graphs[f"eager steps: {reason}"] += 1
                return None
            for layer in step.cache.layers[first : first + len(calls)]:
                layer.pass_by(step.length)
            hidden = calls[0].hidden
            before, after = (hidden.index_copy(0, rows, t[:count]) for t in (piece.before, piece.after))
        return before, after

    @staticmethod
    def _counted(body: Callable[[], None]) -> Counter[str]:
        """Run it; which calls of attention it made."""
        served: Counter[str] = Counter()
        with attention.counted(served):
            body()
        return served


class _Given:
    """What a step gives to the layers of a segment: the tensors, each once, and the form of everything together.

    Attributes
    ----------
    form : tuple
        Hashable; a graph serves whoever gives it the same form.
    """

    def __init__(self, calls: list[LayerCall], rows: Tensor, first: int, step: Step, store: _Store) -> None:
        self.calls, self.rows, self.count, self.step, self.store = calls, rows, len(rows), step, store
        self.hidden = calls[0].hidden
        self.tensors: list[Tensor] = []
        self.masks: list[tuple[Tensor | None, int]] = []  # a layer's mask, and how many keys it is for
        self.whole = step.rows is None and not step.apart
        self._places: dict[Any, int] = {}
        self.arguments: list[dict[str, Any]] = []  # of each layer, with places in the stead of tensors
        layers = step.cache.layers[first:]
        forms: dict[tuple[int, ...], Hashable] = {}  # layers are mostly given the same objects
        form = []
        for call, layer in zip(calls, layers, strict=False):
            seen = layer.seen(step.length + 1)
            same = (seen, *map(id, call.arguments.values()))
            if same not in forms:
                made = {name: self._place(name, value, seen) for name, value in call.arguments.items()
                        if value is not call.cache}  # fmt: skip
                forms[same] = len(self.arguments), tuple(made.items())
            else:
                made = self.arguments[forms[same][0]]  # type: ignore[index]
            self.arguments.append(made)
            form.append(forms[same])
        shapes = tuple((t.shape, t.dtype, t.device) for t in (*self.tensors, self.hidden))
        kinds = tuple((None if m is None else (m.dtype, m.shape[1:-1])) for m, _ in self.masks)
        self.form = (self.whole, step.apart, tuple(form), shapes, kinds)

    def _place(self, name: str, value: Any, seen: int) -> Any:
        if name == "attention_mask":
            return _Mask(self._kept(self.masks, (id(value), seen), (value, seen)))
        if name in ("position_bias", "alibi") and value is not None:
            raise Unrecordable(f"layers that take {name}, which is as wide as the keys")
        if isinstance(value, Tensor):
            return _Place(self._kept(self.tensors, id(value), value))
        if isinstance(value, tuple):
            return tuple(self._place("", v, seen) for v in value)
        if not isinstance(value, _PLAIN):
            raise Unrecordable(f"layers that take {name}, a {type(value).__name__}")
        return value

    def _kept(self, where: list[Any], key: Any, value: Any) -> int:
        index = self._places.setdefault(key, len(where))
        if index == len(where):
            where.append(value)
        return index

    def picked(self, value: Tensor) -> bool:
        """Whether a tensor has a row for each of the batch."""
        return value.dim() > 0 and value.shape[0] == self.step.batch > 1

    def ranges(self, mask: Tensor | None, seen: int) -> Tensor | None:
        """[n, 1, 1, 3] what the rows see of the cache as it lies."""
        return self.step.take.apart(mask, self.rows, self.step.length + 1, seen)


class _Place(int):
    """Of a tensor among those that a segment is given."""


class _Mask(int):
    """Of a mask among those that a segment is given."""


class _Piece:
    """A segment for one bucket of rows, in tensors of its own; recorded when it is needed for the second time."""

    @torch.inference_mode(False)
    def __init__(self, given: _Given, bucket: int, first: int, store: _Store) -> None:
        hidden, device = given.hidden, given.hidden.device
        self.bucket, self._store, self._apart = bucket, store, given.step.apart
        self.rows, self.slots = (torch.zeros(bucket, dtype=torch.int64, device=device) for _ in range(2))
        self.hidden, self.before, self.after = (hidden.new_zeros(bucket, *hidden.shape[1:]) for _ in range(3))
        self.tensors = [
            t.new_zeros(bucket, *t.shape[1:]) if given.picked(t) else torch.zeros_like(t) for t in given.tensors
        ]
        self.masks = [self._mask(mask, hidden) for mask, _ in given.masks]
        self.served: Counter[str] = Counter()
        self.replay: Any = None
        whole = given.whole
        husk = stand_in(given.step.seen, 0)
        husk.get_seq_length = _length_read
        take, static = RowTaker(bucket), [self._filled(own) for own in given.arguments]
        calls = [LayerCall(call.forward, self.hidden, own, take, husk)
                 for call, own in zip(given.calls, static, strict=True)]  # fmt: skip
        places = store.pairs[first : first + len(calls)]

        @torch.no_grad()
        def body() -> None:
            before = after = self.hidden
            for call, (keys, values) in zip(calls, places, strict=True):
                before, call.hidden = after, after
                out = call.run(functools.partial(self._attend, keys, values, whole))
                call.hidden = self.hidden  # what is kept must not hold the graph's memory
                after = out[0] if isinstance(out, tuple) else out
            self.before.copy_(before)
            self.after.copy_(after)

        self.body = body

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        if self._apart:
            return self.rows.new_zeros(self.bucket, 1, 1, 3)
        shape = (self.bucket, 1, 1, self._store.capacity)
        return hidden.new_zeros(shape, dtype=torch.bool if mask is None else mask.dtype)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._filled(v) for name, v in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self._filled, value))
        return self.tensors[value] if type(value) is _Place else self.masks[value] if type(value) is _Mask else value

    def _attend(self, keys: Tensor, values: Tensor, whole: bool, own: KeyValues) -> tuple[Tensor, Tensor]:
        """Store the rows' keys and values; return all that they may attend to."""
        keys[self.rows, :, self.slots] = own.keys[:, :, 0]
        values[self.rows, :, self.slots] = own.values[:, :, 0]
        keys, values = (t.narrow(2, 0, self._store.capacity) for t in (keys, values))
        if self._apart or whole:
            return keys, values
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)

    @torch.no_grad()
    def load(self, given: _Given) -> None:
        """Copy what a step gives into the tensors of the graph; padding repeats row 0, and its token has no place."""
        count, length = given.count, given.step.length
        self.rows[:count].copy_(given.rows)
        self.rows[count:].zero_()
        self.slots[:count].fill_(length)
        self.slots[count:].fill_(self._store.capacity)
        for value, own in zip((given.hidden, *given.tensors), (self.hidden, *self.tensors), strict=True):
            if given.picked(value):
                torch.index_select(value, 0, self.rows, out=own)
            else:
                own.copy_(value)
        for (mask, seen), own in zip(given.masks, self.masks, strict=True):
            if self._apart:
                ranges = given.ranges(mask, seen)
                if ranges is None:
                    raise Unrecordable("a mask that is not one range of keys")
                own[:count].copy_(ranges)
                own[count:].zero_()
            else:
                self._load_mask(mask, own, length + 1, seen)

    def _load_mask(self, mask: Tensor | None, own: Tensor, length: int, seen: int) -> None:
        if seen != length:
            raise Unrecordable("a sliding window without exeunt's attention")
        own.fill_(False if own.dtype == torch.bool else torch.finfo(own.dtype).min)
        if mask is None:
            own[..., :length] = True
            return
        if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] < length:
            raise Unrecordable(f"masks of shape {[*mask.shape]}")
        own[..., :length].copy_(mask[..., :length] if mask.shape[0] == 1 else mask[..., :length][self.rows])


def _length_read(*args: Any) -> int:
    raise Unrecordable("layers that read how long the cache is")


class _Store:
    """Keys and values of all layers at addresses that graphs know; a last place is for the rows of padding.

    Attributes
    ----------
    capacity : int
        Tokens that it has places for, a power of two.
    pairs : list of (Tensor, Tensor)
        Of each layer [B, Hkv, capacity + 1, Dh].
    pieces : dict
        The segments that are recorded on it.
    """

    @torch.inference_mode(False)
    def __init__(self, layers: Sequence[ExitCacheLayer], capacity: int) -> None:
        self.capacity = capacity
        self.pieces: dict[Hashable, _Piece] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            keys, values = (t.new_zeros(*t.shape[:2], capacity + 1, t.shape[3]) for t in layer.storage)
            self.pairs.append((keys, values))

    def holds(self, layers: Sequence[ExitCacheLayer]) -> bool:
        """Whether a cache lies here."""
        return all(layer.lies_in(keys) for layer, (keys, _) in zip(layers, self.pairs, strict=True))

    def fits(self, layers: Sequence[ExitCacheLayer], need: int) -> bool:
        """Whether a cache could lie here that may grow to ``need`` tokens, without wasting much."""

        def kind(t: Tensor) -> tuple[Any, ...]:
            return t.shape[0], t.shape[1], t.shape[3], t.dtype, t.device

        return need <= self.capacity <= 4 * max(need, 64) and all(
            kind(a) == kind(b) for layer, pair in zip(layers, self.pairs, strict=True)
            for a, b in zip(layer.storage, pair, strict=True)
        )  # fmt: skip

    @property
    def free(self) -> bool:
        """Whether nobody else holds its memory: no cache lies here, and nobody has kept a view of one."""
        return all(torch._C._storage_Use_Count(t.untyped_storage()._cdata) <= 2 for pair in self.pairs for t in pair)

    def take(self, layers: Sequence[ExitCacheLayer]) -> None:
        """Move a cache here."""
        for layer, pair in zip(layers, self.pairs, strict=True):
            layer.move_into(*(t.narrow(2, 0, self.capacity) for t in pair))


class _Watched:
    """The modules, parameters and buffers of layers as they were when graphs were recorded."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        modules = [m for layer in layers for m in layer.modules()]
        self._held = [(d, len(d), name, value) for m in modules for d in (m._modules, m._parameters, m._buffers)
                      for name, value in d.items()]  # fmt: skip
        self._addresses = [(t, t.data_ptr()) for *_, t in self._held if isinstance(t, Tensor)]
        self._forwards = [(vars(m), vars(m).get("forward")) for m in modules]

    def same(self) -> bool:
        """Whether nothing has been replaced since; weights that were changed in place are what a graph reads."""
        return (
            all(len(d) == size and d.get(name) is value for d, size, name, value in self._held)
            and all(t.data_ptr() == address for t, address in self._addresses)
            and all(own.get("forward") is forward for own, forward in self._forwards)
        )


class _Watching(TorchDispatchMode):
    """Raises where code reads values of tensors on the host: a graph would go on with those of its recording."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_on_host(func, args):
            raise Unrecordable(f"layers that read tensors on the host ({func})")
        return func(*args, **(kwargs or {}))
