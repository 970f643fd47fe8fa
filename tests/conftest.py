"""Shared pieces: every ISA of this machine as a parameter, and tiny random models."""

from __future__ import annotations

import warnings

import pytest
import torch

warnings.filterwarnings("ignore", message=".*exeunt has no kernel.*")

import backends
from exeunt.ops import _backend

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings; thread counts have their own test


def available_isas() -> list[str]:
    if _backend.cpu is None:
        return []
    chosen = _backend.cpu.isa()
    found = [
        isa
        for isa in ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
        if _backend.cpu.select_isa(isa) == isa
    ]
    _backend.cpu.select_isa(chosen)
    return [isa for isa in found if found.index(isa) <= found.index(chosen)]


@pytest.fixture(params=available_isas())
def isa(request):
    """Run the test once per instruction set, up to the one that EXEUNT_MAX_ISA allows."""
    chosen = _backend.cpu.isa()
    _backend.cpu.select_isa(request.param)
    yield request.param
    _backend.cpu.select_isa(chosen)


@pytest.fixture
def isas():
    """The same instruction sets, one after the other within the test: `for isa in isas`."""
    chosen = _backend.cpu.isa()
    yield filter(_backend.cpu.select_isa, available_isas())
    _backend.cpu.select_isa(chosen)


#: Where an op can run here: on the CPU by instruction set, as CUDA emulated on the CPU, on a CUDA device.
BACKENDS = [
    *available_isas(),
    *(backends.CAPABILITIES if backends.emulated() else []),
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if backends.on_device() else []),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Run the test once per backend; inputs are CPU tensors for all of them."""
    if request.param in available_isas():
        chosen = _backend.cpu.isa()
        _backend.cpu.select_isa(request.param)
        yield request.param
        _backend.cpu.select_isa(chosen)
        return
    if request.param == "cuda":
        backends.patch_ops(monkeypatch)
    elif request.node.callspec.params.get("v", 0) > 40_000:
        pytest.skip("large heads are left to real devices: emulation takes minutes")
    else:
        backends.patch_cpu(monkeypatch, request.param)
    yield request.param
