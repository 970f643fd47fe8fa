"""Tile registers that the operating system refuses: the next best instruction set serves, and `exeunt info` says so."""

import subprocess
import sys

import pytest

from exeunt.ops import _backend

# A seccomp filter that answers EPERM to arch_prctl(ARCH_REQ_XCOMP_PERM, ...), as a kernel without AMX support would.
SCRIPT = """
import ctypes, struct, sys
rules = [
    (0x20, 0, 0, 0),            # load the number of the call
    (0x15, 0, 3, 158),          # arch_prctl?
    (0x20, 0, 0, 16),           # its first argument
    (0x15, 0, 1, 0x1023),       # the request for a register state?
    (0x06, 0, 0, 0x00050001),   # EPERM
    (0x06, 0, 0, 0x7FFF0000),   # allowed
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
libc = ctypes.CDLL(None, use_errno=True)
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):
    sys.exit(77)
import torch, exeunt
from exeunt import cli
from exeunt.ops import _backend
assert _backend.cpu.amx_refused()
assert _backend.cpu.isa() == "avx512_vnni", _backend.cpu.isa()
hidden, head = torch.randn(3, 64).bfloat16(), torch.randn(50, 64).bfloat16()
torch.testing.assert_close(
    exeunt.ops.exit_stats(hidden, head).top1, exeunt.reference.exit_stats(hidden, head).top1, atol=1e-2, rtol=1e-2
)
cli.main(["info"])
"""


def test_refused_tiles_fall_back_once_and_info_says_so():
    if _backend.cpu is None or _backend.cpu.isa() != "amx":
        pytest.skip("no tile registers here")
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    if result.returncode == 77:
        pytest.skip("no seccomp here")
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout and "avx512_vnni" in result.stdout
    assert "Warning" not in result.stderr
