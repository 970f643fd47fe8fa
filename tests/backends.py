"""The CUDA kernels as backends of tests whose tensors lie on the CPU: emulated, and on a device."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from exeunt import ops
from exeunt.ops import KVCache, KVLayer, KVStack, _backend


def emulated():
    """Whether this installation was built with EXEUNT_EMULATE=ON."""
    return importlib.util.find_spec("exeunt._cuda_emu") is not None


def on_device():
    return _backend.cuda is not None and torch.cuda.is_available() and _backend.cuda.device_count() > 0


class Emulated:
    """exeunt._cuda_emu in the place of exeunt._cpu: CPU tensors, and no threads to be told of."""

    takes_float8 = True

    def __init__(self, capability=80):
        self.module = importlib.import_module("exeunt._cuda_emu")
        self.module.set_schedule(1)  # threads in random order, some copies early
        self.module.set_capability(capability)

    def exit_stats_workspace(self, dtype, _form, *args):
        return self.module.exit_stats_workspace(dtype, *args[:-1])

    def exit_stats(self, *args):
        self.module.exit_stats(*args[:-1], 0, 0)

    def small_head(self, *args):
        rows, width, pooler, head = args[3], args[4], args[9], args[10]
        size = self.module.small_head_workspace(head[4], rows, width, pooler[0])
        workspace = torch.full((size + 64,), 255, dtype=torch.uint8)
        self.module.small_head(*args[:-1], workspace.data_ptr(), 0, 0)

    def saturation(self, *args):
        self.module.saturation(*args, 0, 0)

    def KvFill(self, *args):
        return EmulatedKvFill(self.module.KvFill(*args))

    def ragged_attention_workspace(self, *args):
        return 0  # ragged_attention below brings its own

    def ragged_attention(self, *args):
        tokens, heads, kv_heads, size, value_size, _, slots = args[4]
        room = slots * args[23] if args[23] >= 0 else slots
        size = self.module.ragged_attention_workspace(tokens, heads, kv_heads, args[10], room, value_size)
        workspace = torch.full((size + 64,), 255, dtype=torch.uint8)
        self.module.ragged_attention(*args[:-2], (workspace.data_ptr() + 63) & ~63, 0, 0)

    def compact(self, *args):
        self.module.compact(*args[:-1], 0, 0)

    def expand(self, *args):
        self.module.expand(*args[:-1], 0, 0)


class EmulatedKvFill:
    def __init__(self, kernel):
        self.kernel = kernel

    def workspace(self, rows, threads):
        return self.kernel.workspace(rows)

    def fill(self, *args):
        self.kernel.fill(*args[:-1], 0, 0)


#: Emulated devices by name: the kernels for sm_80 on, and those for Hopper.
CAPABILITIES = {"emulated": 80, "emulated_sm90": 90}


def patch_cpu(monkeypatch, name="emulated"):
    monkeypatch.setattr(_backend, "cpu", Emulated(CAPABILITIES[name]))


def moved(t, device="cuda"):
    """The tensor on the device with its strides and offset, whatever lies between its elements."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def moved_stack(stack, device="cuda"):
    """The stack on the device."""
    layers = [KVLayer(*(t if t is None else moved(t, device) for t in vars(layer).values())) for layer in stack.layers]
    names = ("norm", "eps", "key_norm", "key_eps", "shift", "interleaved")
    return KVStack(layers, **{name: getattr(stack, name) for name in names})


def kv_fill_there(kv_fill, device="cuda"):
    """kv_fill on the device for CPU tensors: all goes there, the cache comes back."""

    def move(x):
        if isinstance(x, torch.Tensor):
            return moved(x, device)
        return type(x)(map(move, x)) if isinstance(x, (tuple, list)) else x

    def run(hidden, from_layer, rows, slots, stack, cache, *, rotary=None, until=None):
        there = KVCache(move(cache.keys), move(cache.values))
        places = move((hidden, from_layer, rows, slots))
        kv_fill(*places, moved_stack(stack, device), there, rotary=move(rotary), until=until)
        for old, new in zip(cache.keys + cache.values, there.keys + there.values, strict=True):
            old.copy_(new)

    return run


def patch_ops(monkeypatch):
    """The ops on the device, for CPU tensors: inputs go there, results and logits_out come back."""

    def there(op):
        def run(*args, **kwargs):
            moved_args = [moved(a) if isinstance(a, torch.Tensor) else a for a in args]
            named = {k: moved(a) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
            got = op(*moved_args, **named)
            if kwargs.get("logits_out") is not None:
                kwargs["logits_out"].copy_(named["logits_out"])
            return (
                got.cpu()
                if isinstance(got, torch.Tensor)
                else type(got)._make(None if t is None else t.cpu() for t in got)
            )

        return run

    for name in ("exit_stats", "small_head", "probe", "saturation", "ragged_attention"):
        monkeypatch.setattr(ops, name, there(getattr(ops, name)))
    monkeypatch.setattr(ops, "kv_fill", kv_fill_there(ops.kv_fill))
