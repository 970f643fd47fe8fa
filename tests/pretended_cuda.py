"""A CUDA device pretended on the CPU: tensors that say they lie on ``cuda:0`` and hold a CPU tensor.

Every op goes through :class:`Device`: it runs on the CPU tensors within, and fails as on a device where tensors of two
places meet. So code that assumes the CPU is found without a GPU: row lists made in the wrong place, addresses taken
from the wrong one. ``reads`` notes how often the host waited for a value.
"""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import exeunt
from exeunt import graphs
from exeunt.ops import _backend
from exeunt.recorder import reads_on_host

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
_PACKAGES = tuple(f"{Path(package.__file__).parent}/" for package in (exeunt, transformers))
_ANYWHERE = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
}


class There(torch.Tensor):
    """A tensor on the device."""

    device, is_cuda, is_cpu = CUDA, True, False  # to torch itself it is a CPU tensor: there is no CUDA to guard

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner):
        self.inner = inner

    def __deepcopy__(self, memo):
        return There(self.inner.clone())

    def to(self, *args, copy=False, **kwargs):
        where, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (where is None or on_device(where)) and dtype in (None, self.dtype):
            return self
        if where is None or on_device(where):
            return run(aten._to_copy.default, (self,), {"dtype": dtype})
        Device.reads.append(caller())
        return self.inner.clone().to(where, dtype or self.dtype)

    def cpu(self):
        return self.to("cpu")

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"There({self.inner})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], There):
            return args[0].to(CUDA, args[1].dtype)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def caller():
    """The line of exeunt or of a model that waits."""
    return next(
        f"{Path(f.filename).name}: {f.line}" for f in reversed(traceback.extract_stack())
        if f.filename.startswith(_PACKAGES) or Path(f.filename).name.startswith("test_")
    )  # fmt: skip


class Again:
    """A recorder that runs things again: what the device is told, without what a graph leaves out."""

    def run(self, body):
        body()

    def record(self, body):
        return body

    def follow(self):
        pass

    def wait(self):
        pass

    def replay(self, body):
        body()


def on_device(where):
    return where is not None and torch.device(where).type == "cuda"


def run(func, args, kwargs):
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in given if isinstance(t, There)]
    if there and func not in _ANYWHERE and any(t.dim() and not isinstance(t, There) for t in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, got cuda:0 and cpu in {func}")
    where = kwargs.get("device")
    goes = on_device(where) or bool(there)  # torch itself takes these tensors for some of the CPU
    if there and reads_on_host(func, args):
        Device.reads.append(caller())
    if on_device(where):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    back = {id(t.inner): t for t in there}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    out = func(*args, **kwargs)

    def wrap(t):
        if not isinstance(t, torch.Tensor) or any(t is own for own in given):
            return t
        return back.get(id(t)) if id(t) in back else There(t) if goes else t

    return tree_map(wrap, out)


class Device(TorchDispatchMode):
    """While it is entered there is a device."""

    reads: list = []  # noqa: RUF012

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Kernels:
    """The module of its kernels: the CPU's, since addresses are addresses of the CPU."""

    largest_head = 256  # of ragged_attention, which `run` calls: only ops that torch knows nothing of need kernels here

    class KvFill:
        def __init__(self, *args):
            self.kernel = _backend.cpu.KvFill(*args)

        def workspace(self, rows):
            return self.kernel.workspace(rows, 1) + 64

        def fill(self, *args):
            self.kernel.fill(*args[:-2], 1)


@contextlib.contextmanager
def device(monkeypatch):
    """Inside of the block ``torch.device("cuda")`` is a device."""
    make = torch.tensor

    def tensor(data, *args, device=None, **kwargs):
        made = make(data, *args, **kwargs)
        return made.to(CUDA) if on_device(device) else made

    place = _backend.place
    torch._C._ensureCUDADeviceGuardSet()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(_backend, "cuda", Kernels)
        patch.setattr(graphs, "recorder_for", lambda where: Again() if where.type == "cuda" else None)
        patch.setattr(_backend, "place", lambda where: (0, 0) if where.type == "cuda" else place(where))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        Device.reads = []
        with Device():
            yield Device


def move(module):
    """A module with its parameters and buffers on the device."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(There(p.detach()), requires_grad=False)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = There(b)
    return module
