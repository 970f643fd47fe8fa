"""What this installation of exeunt runs on: versions, kernels, threads, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import exeunt
from exeunt.ops import _backend

__all__ = ["collect", "openmp_runtimes", "render"]


def collect() -> dict[str, Any]:
    """Everything that ``exeunt info`` tells.

    Returns
    -------
    dict
        Plain values by section, ready for JSON; None where a thing is missing or unknown.

    Examples
    --------
    >>> from exeunt import info
    >>> sorted(info.collect())
    ['cpu', 'cuda', 'versions']
    """
    cpu, cuda = _backend.cpu, _backend.cuda
    devices = None if cuda is None else [f"sm_{cuda.compute_capability(i)}" for i in range(cuda.device_count())]
    return {
        "versions": {
            "exeunt": exeunt.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "transformers": _version("transformers"),
        },
        "cpu": {
            "kernels": cpu is not None,
            "isa": None if cpu is None else cpu.isa(),
            "amx_refused": cpu is not None and cpu.amx_refused(),
            "max_isa": os.environ.get("EXEUNT_MAX_ISA") or None,
            "threads": torch.get_num_threads(),
            "openmp": openmp_runtimes(),
        },
        "cuda": {
            "kernels": cuda is not None,
            "runtime": None if cuda is None else cuda.runtime_version(),
            "archs": None if cuda is None else cuda.built_archs(),
            "devices": devices,
            "torch": torch.version.cuda,
        },
    }


def openmp_runtimes(maps: str | os.PathLike[str] = "/proc/self/maps") -> list[str] | None:
    """File names of the OpenMP runtimes in this process; None where the system does not tell.

    Two of them start two sets of threads, which then fight for the cores.

    Examples
    --------
    >>> from exeunt import info
    >>> info.openmp_runtimes("no such file") is None
    True
    """
    try:
        lines = Path(maps).read_text().splitlines()
    except OSError:
        return None
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    names = [Path(path).name for path in sorted(paths)]  # by path: two files of one name are two runtimes
    return [name for name in names if re.match(r"lib(gomp(?!-plugin)|i?omp\d*)\b.*\.so", name)]


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as lines of text.

    Examples
    --------
    >>> from exeunt import info
    >>> print(info.render(info.collect()).splitlines()[0].split()[0])
    exeunt
    """
    cpu, cuda = facts["cpu"], facts["cuda"]
    lines = [(name, version or "not installed") for name, version in facts["versions"].items()]
    lines.append(("CPU kernels", "missing: the torch reference serves" if not cpu["kernels"] else cpu["isa"]))
    if cpu["amx_refused"]:
        lines.append(("", "AMX: the operating system refused it, the next best serves"))
    if cpu["max_isa"]:
        lines.append(("", f"EXEUNT_MAX_ISA={cpu['max_isa']}"))
    lines.append(("threads", str(cpu["threads"])))
    runtimes = cpu["openmp"]
    lines.append(("OpenMP", "unknown" if runtimes is None else ", ".join(runtimes) or "none loaded"))
    if runtimes and len(runtimes) > 1:
        lines.append(("", f"warning: {len(runtimes)} OpenMP runtimes in one process slow each other down"))
    if cuda["kernels"]:
        major, minor = divmod(cuda["runtime"] // 10, 100)
        lines.append(("CUDA kernels", f"built with CUDA {major}.{minor} for {cuda['archs']}"))
        lines.append(("CUDA devices", ", ".join(cuda["devices"]) or "none"))
    else:
        lines.append(("CUDA kernels", "not built"))
    lines.append(("CUDA of torch", cuda["torch"] or "none"))
    return "\n".join(f"{name:<15}{text}" for name, text in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
