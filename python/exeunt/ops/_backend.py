"""The extension modules: which are there, and how tensors reach them."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from types import ModuleType

import torch  # before the extensions: they then share the OpenMP runtime that torch has loaded
from torch import Tensor

from exeunt.memory import zeros_on_huge_pages

#: What the kernels take for hidden states, heads and parameters, as csrc/core/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Norms as csrc/core/params.h numbers them.
NORMS = {None: 0, "rms": 1, "layer": 2}

_CODES = DTYPES | {torch.int8: 3, torch.float8_e4m3fn: 4}  # of a PackedHead, of an Fp8Head

_float, _CPU = torch.float32, torch.device("cpu")


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"exeunt.{name}")
    except ModuleNotFoundError:
        return None


cpu = _module("_cpu")
cuda = _module("_cuda")
if cpu is not None:
    try:
        cpu.select_isa(os.environ.get("EXEUNT_MAX_ISA", ""))
    except ValueError as error:
        # An import that fails shows a page of frames; the sentence, and a library that works, serve better.
        cpu.select_isa("")
        warnings.warn(f"{error}: ignored, the best of this machine ({cpu.isa()}) serves", stacklevel=1)


def kernels(device: torch.device) -> ModuleType | None:
    """The module whose kernels take tensors of that device; None where this build has none for it."""
    return cpu if device == _CPU else cuda if device.type == "cuda" else None


def place(device: torch.device) -> tuple[int, ...]:
    """What a kernel is told about where it runs: threads on a CPU; device and stream on CUDA."""
    if device == _CPU:
        return (torch.get_num_threads(),)
    return (device.index, torch.cuda.current_stream(device).cuda_stream)


class _Scratch(threading.local):
    memory = torch.empty(0, dtype=torch.uint8)
    size = 0


_scratch = _Scratch()
_KEPT = 1 << 24  # bytes of scratch that a thread holds on to at most


def scratch(size: int) -> Tensor:
    """At least that many bytes for one call of a CPU kernel, the calling thread's until it asks again.

    They are kept, on huge pages: memory that comes anew with every call costs a walk through the page tables every
    4 KB, microseconds each after a head was read.
    """
    if size <= _scratch.size:
        return _scratch.memory
    huge = 1 << 21
    memory = zeros_on_huge_pages((-(-size // huge) * huge + huge,), torch.uint8)
    memory = memory[-memory.data_ptr() % huge :]
    if size <= _KEPT:
        _scratch.memory, _scratch.size = memory, memory.shape[0]
    return memory


_PLAIN = (Tensor, torch.nn.Parameter)
# Names of their own: after a head was read each step along torch.a.b.c waits for memory.
_compiles = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_warned: set[str] = set()


def warn_fallback(op: str, device: torch.device) -> None:
    """Say once per op and device that the plain torch reference serves."""
    key = f"{op} on {device.type}"
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"exeunt has no kernel for {key} in this build: the torch reference serves", stacklevel=4)


def direct(hidden: Tensor, weight: Tensor) -> bool:
    """Whether an op may skip the dispatcher: plain eager tensors, and nothing traces."""
    return (
        type(hidden) in _PLAIN
        and type(weight) in _PLAIN
        and (hidden.is_cpu or hidden.is_cuda)
        and not _compiles()
        and not _dispatch_modes()
        and _functorch_level() is None
    )


#: (address, dtype, stride) as the binding wants an optional vector.
Vector = tuple[int, int, int]
NO_VECTOR: Vector = (0, 0, 0)


def check_vector(
    op: str, name: str, vector: Tensor, size: int, hidden: torch.dtype, device: torch.device, addressed: bool = False
) -> Vector:
    """Raise unless it has that size, and what goes with hidden states of that dtype there; the vector, with address
    or without."""
    if vector.shape != (size,):
        raise ValueError(f"{op}: {name} must have shape [{size}], got {list(vector.shape)}")
    dtype = vector.dtype
    if dtype is not _float and dtype is not hidden:
        raise TypeError(f"{op}: {name} must be float32 or {hidden}, got {dtype}")
    if vector.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like hidden, got {vector.device}")
    return vector.data_ptr() if addressed else 0, DTYPES[dtype], vector.stride()[0]


def pointer(t: Tensor | None) -> int:
    """Address as the binding wants an optional contiguous tensor."""
    return 0 if t is None else t.data_ptr()


def vector_arg(t: Tensor | None) -> Vector:
    """An optional vector as the binding wants it."""
    return NO_VECTOR if t is None else (t.data_ptr(), DTYPES[t.dtype], t.stride()[0])


def weight_arg(weight: Tensor, scale: Tensor | None = None) -> tuple[int, int, int, int, int, int, int]:
    """A weight [V, D] of unit stride along D, or what a PackedHead or Fp8Head holds, as WeightArg of core/params.h."""
    dtype, strides = _CODES[weight.dtype], weight.stride()
    if len(strides) > 2:  # 4: tiles; 5: turned (packed_head.in_tiles)
        return weight.data_ptr(), dtype, len(strides) - 3, weight.shape[1] * 1024, 64, 1024, pointer(scale)
    row = strides[0] * weight.element_size()
    return weight.data_ptr(), dtype, 0, 16 * row, row, 64, pointer(scale)
