"""Huge pages: memory that is read from end to end, as weights and caches are, is read faster on them.

A core that streams through memory walks the page tables every 4 KB, and its prefetcher begins anew there; on pages of
2 MB it does so 512 times less often.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

__all__ = ["huge_pages", "zeros_on_huge_pages"]

_PAGE = 1 << 21
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
_LINE = 64


def huge_pages(module: nn.Module) -> int:
    """Move a model's weights to huge pages: what is bound by reading them becomes faster.

    That is every step of a decoder with few rows, in the model's own layers as in exeunt's kernels. It asks Linux (6.1
    or newer) for pages of 2 MB, whatever the system's setting for them is, wherever parameters and buffers on the CPU
    fill at least half of one, and takes 2 to 3 s for a GB. Values stay, and so do addresses, unless weights are mapped
    from a file (`from_pretrained` does that where it need not convert them): those, and with them small ones that are
    on no huge page, are copied to memory of their own. May be called before or after `attach`, whenever the model does
    not run. Where the system has no such pages nothing is done.

    Parameters
    ----------
    module : torch.nn.Module
        A model or a part of one.

    Returns
    -------
    int
        Bytes that now lie on huge pages: 0 where the system has none to give.

    Examples
    --------
    >>> import exeunt, torch
    >>> model = torch.nn.Linear(1024, 4096)
    >>> exeunt.huge_pages(model) <= 2**24
    True
    """
    trial = zeros_on_huge_pages((2 * _PAGE,), torch.uint8).fill_(1)
    if not _collapse(_filled([trial])):
        return 0
    by_storage: defaultdict[int, list[Tensor]] = defaultdict(list)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_cpu and tensor.untyped_storage().nbytes():
            by_storage[tensor.untyped_storage().data_ptr()].append(tensor)
    firsts = [tensors[0] for tensors in by_storage.values()]
    wanted = _filled(firsts)
    huge = _collapse(wanted)
    elsewhere = [tensors for tensors in by_storage.values() if huge.isdisjoint(_pages(tensors[0]))]
    if any(not wanted.isdisjoint(_pages(tensors[0])) for tensors in elsewhere):
        _copy(elsewhere)
        huge = _collapse(_filled(firsts))
    return _PAGE * len(huge)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where its storage begins and ends."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _pages(tensor: Tensor) -> range:
    """Numbers of the pages that hold something of its storage."""
    start, stop = _place(tensor)
    return range(start // _PAGE, (stop - 1) // _PAGE + 1)


def _filled(tensors: Iterable[Tensor]) -> set[int]:
    """Pages that their storages fill at least half."""
    filled: Counter[int] = Counter()
    for tensor in tensors:
        start, stop = _place(tensor)
        for page in _pages(tensor):
            filled[page] += min(stop, (page + 1) * _PAGE) - max(start, page * _PAGE)
    return {page for page, size in filled.items() if 2 * size >= _PAGE}


def _collapse(pages: set[int]) -> set[int]:
    """Those of them that are huge now."""
    if sys.platform != "linux":
        return set()
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return {page for page in pages if madvise(page * _PAGE, _PAGE, _COLLAPSE) == 0}


def _copy(groups: list[list[Tensor]]) -> None:
    """Give each group, which shares a storage, another one; the new storages lie side by side."""
    sizes = [group[0].untyped_storage().nbytes() for group in groups]
    starts = [0, *accumulate(-(-size // _LINE) * _LINE for size in sizes)]
    memory = _mapped(starts[-1])
    for group, start, size in zip(groups, starts, sizes, strict=False):
        new = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).untyped_storage()
        new.copy_(group[0].untyped_storage())
        for tensor in group:
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(new, *place)


def zeros_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in memory of their own on huge pages, where the system has them.

    Examples
    --------
    >>> import torch
    >>> from exeunt.memory import zeros_on_huge_pages
    >>> zeros_on_huge_pages((2, 3), torch.float32)
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    count = math.prod(shape)
    return torch.frombuffer(_mapped(count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
