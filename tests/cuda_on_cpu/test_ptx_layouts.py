"""Every PTX string of ptx.cuh, interpreted as the PTX manual documents it, against its emulation.

The interpreter knows the manual's operand order and its figures of which lane holds what; it shares no code with
ptx_emulated.h. So a string with two operands exchanged, or an emulation with another layout, shows here.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

backends = pytest.importorskip("backends")
if not backends.emulated():
    pytest.skip("needs a build with EXEUNT_EMULATE=ON", allow_module_level=True)
emu = importlib.import_module("exeunt._cuda_emu")

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
LANES = range(32)


def assembly():
    """(instruction with the wrapper's own names as operands) by wrapper, read from ptx.cuh."""
    text = re.sub(r"//.*", "", (CUDA / "ptx.cuh").read_text())
    found = {}
    for match in re.finditer(
        r"(\w+(?:<\w+>)?)\(([^()]*(?:\([^()]*\)[^()]*)*)\)\s*\{\s*asm volatile\((.*?)\);", text, re.S
    ):
        name, _, body = match.groups()
        strings = re.match(r'\s*((?:"[^"]*"\s*)+)(.*)', body, re.S)
        code = "".join(re.findall(r'"([^"]*)"', strings[1]))
        operands = re.findall(r'"[+=]?[rlfn]"\(((?:[^()]|\([^()]*\))*)\)', strings[2])
        inner = [re.sub(r"^shared_address\((.*)\)$", r"\1", o) for o in operands]
        found[name] = re.sub(r"%(\d+)", lambda m, inner=inner: inner[int(m[1])], code).rstrip(";")
    return found


ASSEMBLY = assembly()


def test_every_string_is_interpreted_here_and_stands_in_one_file():
    handled = {"cp_async_16", "cp_async_commit", "cp_async_wait", "ldmatrix_x4", "mma<BFloat16>", "mma<Float16>"}
    assert set(ASSEMBLY) == handled
    others = [f for f in CUDA.rglob("*") if f.name != "ptx.cuh" and re.search(r"\basm\b", f.read_text())]
    assert not others


def words(halves):
    """Pairs of 16-bit patterns, the first in the low half."""
    pairs = halves.astype(np.uint32).reshape(*halves.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 16


def widen(bits, kind):
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


@pytest.mark.parametrize("wrapper,kind", [("mma<BFloat16>", "bf16"), ("mma<Float16>", "f16")])
def test_mma(wrapper, kind):
    opcode, operands = ASSEMBLY[wrapper].split(" ", 1)
    assert opcode == f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    groups = [[o.strip() for o in group.split(",")] for group in re.findall(r"\{([^}]*)\}", operands)]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((32, 12)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    named = {"a": words(bits[:, :8]), "b": words(bits[:, 8:]), "d": rng.standard_normal((32, 4)).astype(np.float32)}

    def operand(name):
        letter, index = re.fullmatch(r"(\w)\[(\d)\]", name).groups()
        return named[letter][:, int(index)]

    d, a, b, c = groups
    a_elements = np.stack([widen((operand(r) >> 16 * h) & 0xFFFF, kind) for r in a for h in (0, 1)], 1)
    b_elements = np.stack([widen((operand(r) >> 16 * h) & 0xFFFF, kind) for r in b for h in (0, 1)], 1)
    A, B, C = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in LANES:  # the manual's "Matrix Fragments for mma.m16n8k16 with floating point type"
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            A[row, thread * 2 + (i & 1) + (0 if i < 4 else 8)] = a_elements[lane, i]
        for i in range(4):
            B[thread * 2 + (i & 1) + (0 if i < 2 else 8), group] = b_elements[lane, i]
        for i in range(4):
            C[group if i < 2 else group + 8, thread * 2 + (i & 1)] = operand(c[i])[lane]
    D = A @ B + C
    expected = np.zeros((32, 4))
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i, name in enumerate(d):
            expected[lane, int(name[2])] = D[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    run = emu.mma_bf16 if kind == "bf16" else emu.mma_f16
    got = run(*(named[k].tolist() for k in ("a", "b", "d")))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_ldmatrix():
    match = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \{(.*)\}, \[row\]", ASSEMBLY["ldmatrix_x4"])
    assert [o.strip() for o in match[1].split(",")] == [f"r[{i}]" for i in range(4)]
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 2048, dtype=np.uint8)
    offsets = 16 * rng.permutation(128)[:32]
    rows = np.stack([shared[o : o + 16].view(np.uint16) for o in offsets]).reshape(4, 8, 8)  # lanes 8 m + i bring row i
    got = np.array(emu.ldmatrix_x4(shared.tobytes(), offsets.tolist()))
    for lane in LANES:
        for matrix in range(4):
            low, high = rows[matrix, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(np.uint32)
            assert got[lane, matrix] == low | high << 16


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 16])
def test_cp_async(count):
    # cp.async.cg.shared.global{.prefetch} [dst], [src], 16, src-size: zeros from src-size on
    assert ASSEMBLY["cp_async_16"] == "cp.async.cg.shared.global.L2::128B [shared], [global], 16, bytes"
    assert ASSEMBLY["cp_async_commit"] == "cp.async.commit_group"
    assert ASSEMBLY["cp_async_wait"] == "cp.async.wait_group kPending"
    source = bytes(range(1, 17))
    emu.set_schedule(0)  # copies land late
    before, after = emu.cp_async_16(source, count)
    assert before == b"\xff" * 16 and after == source[:count] + bytes(16 - count)
