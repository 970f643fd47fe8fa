"""Read bandwidth and multiply-add peaks of this machine, the floors of every kernel: `python benchmarks/peaks.py`."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peaks.cpp")


def library() -> ctypes.CDLL:
    """peaks.cpp, built for this machine by its own compiler."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peaks.so"
        subprocess.run(
            ["g++", "-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", SOURCE, "-o", out], check=True
        )
        lib = ctypes.CDLL(str(out))
    for name in ("read_bandwidth", "read_rate", "read_tiles_rate", "peak_rate"):
        getattr(lib, name).restype = ctypes.c_double
    lib.read_bandwidth.argtypes = [ctypes.c_int64, *[ctypes.c_int] * 4]
    lib.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    lib.read_tiles_rate.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    lib.peak_name.restype = ctypes.c_char_p
    return lib


def measure(threads: int | None = None, rounds: int = 8) -> tuple[float, dict[str, float]]:
    """Read bandwidth in GB/s (best of 1, 2, 4, 8 streams a thread, small and huge pages) and peaks in GFLOP/s."""
    lib, threads = library(), threads or torch.get_num_threads()
    bandwidth = max(
        lib.read_bandwidth(1 << 29, threads, streams, huge, rounds) for streams in (1, 2, 4, 8) for huge in (0, 1)
    )
    peaks, i = {}, 0
    while name := lib.peak_name(i):
        peaks[name.decode()] = lib.peak_rate(i, threads, 4 * rounds)
        i += 1
    return bandwidth, peaks


def main() -> None:
    """Print the floors for one thread and for all that torch uses."""
    for threads in sorted({1, torch.get_num_threads()}):
        bandwidth, peaks = measure(threads)
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in peaks.items())
        print(f"{threads} threads: read {bandwidth:.1f} GB/s; multiply-add peaks in GFLOP/s: {rates}")


if __name__ == "__main__":
    main()
