"""The CUDA kernels as backends of tests whose tensors lie on the CPU: emulated, and on a device."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from exeunt import ops
from exeunt.ops import _backend


def emulated():
    """Whether this installation was built with EXEUNT_EMULATE=ON."""
    return importlib.util.find_spec("exeunt._cuda_emu") is not None


def on_device():
    return _backend.cuda is not None and torch.cuda.is_available() and _backend.cuda.device_count() > 0


class Emulated:
    """exeunt._cuda_emu in the place of exeunt._cpu: CPU tensors, and no threads to be told of."""

    def __init__(self):
        self.module = importlib.import_module("exeunt._cuda_emu")
        self.module.set_schedule(1)  # threads in random order, some copies early

    def exit_stats_workspace(self, *args):
        return self.module.exit_stats_workspace(*args[:-1])

    def exit_stats(self, *args):
        self.module.exit_stats(*args[:-1], 0, 0)


def patch_cpu(monkeypatch):
    monkeypatch.setattr(_backend, "cpu", Emulated())


def moved(t, device="cuda"):
    """The tensor on the device with its strides and offset, whatever lies between its elements."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def patch_ops(monkeypatch):
    """ops.exit_stats on the device, for CPU tensors: inputs go there, results and logits_out come back."""
    run = ops.exit_stats

    def exit_stats(*args, **kwargs):
        there = [moved(a) if isinstance(a, torch.Tensor) else a for a in args]
        named = {k: moved(a) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
        got = run(*there, **named)
        if kwargs.get("logits_out") is not None:
            kwargs["logits_out"].copy_(named["logits_out"])
        return type(got)._make(None if t is None else t.cpu() for t in got)

    monkeypatch.setattr(ops, "exit_stats", exit_stats)
