"""Every PTX string of ptx.cuh and ptx_sm90.cuh, interpreted as the PTX manual documents it, against its emulation.

The interpreter knows the manual's operand order and its figures of which lane holds what; it shares no code with
the emulation. So a string with two operands exchanged, or an emulation with another layout, shows here.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

backends = pytest.importorskip("backends")
if not backends.emulated():
    pytest.skip("needs a build with EXEUNT_EMULATE=ON", allow_module_level=True)
emu = importlib.import_module("exeunt._cuda_emu")

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
LANES = range(32)


FILES = ["ptx.cuh", "ptx_sm90.cuh"]
WGMMA_ROWS = [8, 16, 32, 64, 128]


def assembly():
    """(instruction with the wrapper's own names as operands) by wrapper, read from the files."""
    text = "\n".join((CUDA / name).read_text() for name in FILES)
    text = re.sub(r"#(include|pragma).*", "", text)
    expand = [os.environ.get("CXX", "g++"), "-E", "-P", "-x", "c++", "-"]
    text = subprocess.run(expand, input=text, capture_output=True, text=True, check=True).stdout
    found = {}
    for match in re.finditer(
        r"(\w+(?:<[\w, ]+>)?)\(([^()]*(?:\([^()]*\)[^()]*)*)\)\s*\{\s*"
        r"(?:uint32_t \w+;\s*)?asm volatile\((.*?)\);",
        text,
        re.S,
    ):
        name, _, body = match.groups()
        strings = re.match(r'\s*((?:"[^"]*"\s*)+)(.*)', body, re.S)
        code = "".join(re.findall(r'"([^"]*)"', strings[1]))
        operands = re.findall(r'"[+=]?[rlfn]"\s*\(((?:[^()]|\([^()]*\))*)\)', strings[2])
        inner = [re.sub(r"^shared_address\((.*)\)$", r"\1", o) for o in operands]
        found[name] = re.sub(r"%(\d+)", lambda m, inner=inner: inner[int(m[1])], code).rstrip(";")
    return found


ASSEMBLY = assembly()


def test_every_string_is_interpreted_here_and_stands_in_two_files():
    copies = {"cp_async_16", "cp_async_commit", "cp_async_wait", "ldmatrix_x4", "ldmatrix_x4_trans", "tma_load"}
    products = {f"{name}<{t}>" for t in KINDS for name in ("mma", "pack")} | {
        f"wgmma<{t}, {n}>" for t in KINDS for n in WGMMA_ROWS
    }
    handled = {*PLAIN, *copies, *products}
    assert set(ASSEMBLY) == handled
    others = [f for f in CUDA.rglob("*") if f.name not in FILES and re.search(r"\basm\b", f.read_text())]
    assert not others


#: Strings whose operands are few, as the manual's syntax has them.
PLAIN = {
    "mbarrier_init": "mbarrier.init.shared::cta.b64 [barrier], arrivals",
    "mbarrier_init_fence": "fence.mbarrier_init.release.cluster",
    "mbarrier_arrive": "mbarrier.arrive.shared::cta.b64 _, [barrier]",
    "mbarrier_arrive_expect_tx": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], bytes",
    "mbarrier_try_wait": "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [barrier], parity; "
    "selp.u32 completed, 1, 0, done; }",
    "wgmma_fence": "wgmma.fence.sync.aligned",
    "wgmma_commit": "wgmma.commit_group.sync.aligned",
    "wgmma_wait": "wgmma.wait_group.sync.aligned kPending",
    "registers_down_to": "setmaxnreg.dec.sync.aligned.u32 kRegisters",
    "registers_up_to": "setmaxnreg.inc.sync.aligned.u32 kRegisters",
    "barrier_sync": "bar.sync id, threads",
    "multiply_bf16x2": "fma.rn.bf16x2 product, a, b, 0x80008000u",  # a b - 0 in both halves
}
KINDS = {"BFloat16": "bf16", "Float16": "f16"}


@pytest.mark.parametrize("wrapper", PLAIN)
def test_strings_without_a_layout(wrapper):
    assert ASSEMBLY[wrapper] == PLAIN[wrapper]


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


@pytest.mark.parametrize("turned", [False, True])
def test_ldmatrix(turned):
    wrapper, trans = ("ldmatrix_x4_trans", r"\.trans") if turned else ("ldmatrix_x4", "")
    pattern = rf"ldmatrix\.sync\.aligned\.m8n8\.x4{trans}\.shared\.b16 \{{(.*)\}}, \[row\]"
    match = re.fullmatch(pattern, ASSEMBLY[wrapper])
    assert [o.strip() for o in match[1].split(",")] == [f"r[{i}]" for i in range(4)]
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 2048, dtype=np.uint8)
    offsets = 16 * rng.permutation(128)[:32]
    rows = np.stack([shared[o : o + 16].view(np.uint16) for o in offsets]).reshape(4, 8, 8)  # lanes 8 m + i bring row i
    if turned:
        rows = rows.transpose(0, 2, 1)
    got = np.array(getattr(emu, wrapper)(shared.tobytes(), offsets.tolist()))
    for lane in LANES:
        for matrix in range(4):
            low, high = rows[matrix, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(np.uint32)
            assert got[lane, matrix] == low | high << 16


@pytest.mark.parametrize("wrapper,kind", [("pack<BFloat16>", "bf16"), ("pack<Float16>", "f16")])
def test_pack(wrapper, kind):
    # cvt.rn.{bf16x2|f16x2}.f32 d, a, b: the upper half is a's, the lower b's
    assert ASSEMBLY[wrapper] == f"cvt.rn.{kind}x2.f32 pair, high, low"
    pair = getattr(emu, f"pack_{kind}")(1.0, -2.0)
    assert widen(np.array([pair & 0xFFFF, pair >> 16]), kind).tolist() == [1.0, -2.0]


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


def exchanged(address):
    """Where a byte lies under 128-byte swizzle: 16-byte units exchanged within 128 bytes by the 128-byte row, mod 8."""
    return (address // 128) * 128 + (((address // 16) % 8) ^ ((address // 128) % 8)) * 16 + address % 16


@pytest.mark.parametrize("x,y", [(0, 0), (64, 8), (32, 3), (64, 40)])
def test_tma_load(x, y):
    # cp.async.bulk.tensor.2d.dst.src.completion [dstMem], [tensorMap, {c0, c1}], [mbar]; c0 along the rows
    assert ASSEMBLY["tma_load"] == (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [shared], [map, {x, y}], [barrier]"
    )
    rows, width, row_elements, box_rows = 21, 100, 104, 16
    matrix = np.random.default_rng(0).integers(1, 2**16, (rows, row_elements), dtype=np.uint16)
    padded = np.zeros((y + box_rows, x + 64), np.uint16)  # what lies outside the tensor arrives as zeros
    inside = matrix[: padded.shape[0], :width][:, : padded.shape[1]]
    padded[: inside.shape[0], : inside.shape[1]] = inside
    box = padded[y : y + box_rows, x : x + 64].copy().view(np.uint8).reshape(-1)
    expected = np.zeros_like(box)
    expected[exchanged(np.arange(box.size))] = box
    emu.set_schedule(0)
    before, after = emu.tma_load(matrix.tobytes(), rows, width, 2 * row_elements, box_rows, x, y)
    assert before == b"\xff" * box.size and after == expected.tobytes()


@pytest.mark.parametrize("rows", WGMMA_ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma(kind, rows):
    """The manual's matrix descriptor, D fragment of m64nNk16, and operand order, beside the emulation."""
    element = KINDS[kind]
    match = re.fullmatch(
        r"\{ \.reg \.pred add; setp\.eq\.u32 add, 0, 0; (\S+) \{(.*)\}, a, b, add, 1, 1, 0, 0; \}",
        ASSEMBLY[f"wgmma<{kind}, {rows}>"],
    )  # scale-d true, a and b not negated, both K-major
    assert match[1] == f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{element}.{element}"
    registers = [r.strip() for r in match[2].split(",")]
    at = [[eval(i) for i in re.fullmatch(r"d\[(.*)\]\[(.*)\]", r).groups()] for r in registers]
    assert len(at) == rows // 2
    rng = np.random.default_rng(rows)
    values = rng.standard_normal(16 << 9).astype(np.float32)
    bits = (values.view(np.uint32) >> 16) if element == "bf16" else values.astype(np.float16).view(np.uint16)
    shared = bits.astype(np.uint16).view(np.uint8)
    a_start, a_apart, b_start, b_apart = 1024 + 32, 2048, 0, 1024  # the second eights of a, its second 16 elements

    def descriptor(start, apart):
        return start >> 4 | 1 << 16 | apart >> 4 << 32 | 1 << 62

    def operand(start, apart, count):
        r, byte = np.arange(count)[:, None], np.arange(32)[None]
        where = exchanged(start + r // 8 * apart + r % 8 * 128 + byte)
        return widen(np.ascontiguousarray(shared[where % shared.size]).view(np.uint16), element)

    A, B = operand(a_start, a_apart, 64), operand(b_start, b_apart, rows)
    old = rng.standard_normal((128, rows // 2)).astype(np.float32)
    expected = np.zeros_like(old)
    for thread in range(128):
        warp, group, t = thread // 32, thread % 32 // 4, thread % 4
        for i, (j, q) in enumerate(at):  # the i-th register of the list
            row, column = 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2
            expected[thread, 4 * j + q] = old[thread, 4 * j + q] + A[row] @ B[column]
    run = getattr(emu, f"wgmma_{element}_{rows}")
    got = run(shared.tobytes(), descriptor(a_start, a_apart), descriptor(b_start, b_apart), old.tolist())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
