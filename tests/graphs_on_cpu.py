"""CUDA graphs emulated on the CPU: what is recorded is a list of torch ops on the tensors that they had.

A replay runs the ops again on the same memory, with no Python of the recorded code in between. As on a device,
decisions of the recording stand, what is not copied into the graph's tensors is not seen, reading a value on the host
fails, and recording itself changes nothing. Harsher than a device in two ways: tensors that were made while recording
are full of NaN after every replay, since other graphs of the pool may use their memory; and a graph that reads memory
which was there before and has been freed raises, where a device would read whatever lies there now.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from exeunt import graphs
from exeunt.recorder import Unrecordable, reads_on_host


class FreedMemory(RuntimeError):
    """A graph reads tensors that nobody holds any more."""


class Outside:
    """A tensor that was there before the recording: its memory by a weak reference, and where in it."""

    def __init__(self, t):
        self.storage, self.form = StorageWeakRef(t.untyped_storage()), (t.dtype, *place_of(t))

    def tensor(self):
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise FreedMemory(f"a graph reads a tensor {self.form} that was freed")
        return torch.empty(0, dtype=self.form[0]).set_(storage, *self.form[1:])


def place_of(t):
    return t.storage_offset(), tuple(t.shape), t.stride()


def tensors_in(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


def address(t):
    return t.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """A graph: records the ops that run inside of it; ``replay`` runs them again."""

    def __init__(self):
        super().__init__()
        self.ops, self.own, self.before, self.numbers = [], {}, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads_on_host(func, args):
            raise Unrecordable(f"layers that cannot be recorded ({func})")
        flat, form = tree_flatten((args, kwargs or {}))
        given = tensors_in(flat)
        if func._schema.is_mutable:
            for t in given:
                if address(t) not in self.own:
                    self.before.setdefault(address(t), (t.untyped_storage(), t.untyped_storage().clone()))
        out = func(*args, **(kwargs or {}))
        known = {*self.own, *map(address, given)}
        results = tensors_in(out)
        if func is torch.ops.aten.lift_fresh.default:  # a number of the host, which a launch carries with it
            self.numbers.extend(results)
            return out
        fresh = [address(t) not in known for t in results]
        self.own.update((address(t), t) for t, new in zip(results, fresh, strict=True) if new)
        if any(fresh) or func._schema.is_mutable:  # others only give another view
            self.ops.append((func, [self.kept(t) for t in flat], form, results, fresh))
        return out

    def kept(self, t):
        return Outside(t) if isinstance(t, torch.Tensor) and address(t) not in self.own else t

    def undo(self):
        for storage, before in self.before.values():
            storage.copy_(before)
        self.before = {}

    @torch.inference_mode()
    def replay(self):
        for func, flat, form, results, fresh in self.ops:
            args, kwargs = tree_unflatten([t.tensor() if isinstance(t, Outside) else t for t in flat], form)
            got = tensors_in(func(*args, **kwargs))
            for old, new, own in zip(results, got, fresh, strict=True):
                if own:
                    old.copy_(new)
        for t in self.own.values():
            if t.is_floating_point():
                t.fill_(float("nan"))


class Recorder:
    """In the place of exeunt.recorder.Recorder."""

    def __init__(self):
        self.count = 0

    def run(self, body):
        body()

    def record(self, body):
        self.count += 1
        tape = Tape()
        with tape:
            body()
        tape.undo()
        return tape

    def follow(self):
        pass

    def wait(self):
        pass

    def replay(self, graph):
        graph.replay()


def on(monkeypatch):
    """Models on the CPU run their steps in graphs, too, where exits are put on them from here on."""
    monkeypatch.setattr(graphs, "recorder_for", lambda device: Recorder())
