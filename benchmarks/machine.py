"""What a table of figures says of where it was measured."""

from __future__ import annotations

from pathlib import Path

from exeunt.ops._backend import cpu


def machine() -> str:
    """Name of the processor, and the instruction set that exeunt's kernels use on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name} ({'reference kernels' if cpu is None else cpu.isa()})"
