"""What the build says about CUDA."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def configure(tmp_path, **env):
    """Run CMake's configure step where no CUDA compiler can be found; return what it printed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "g++", "gcc", "cc", "make", "ninja", "ld", "as", "ar", "ranlib", "sh", "env", "uname"):
        if shutil.which(tool):
            (tools / tool).symlink_to(shutil.which(tool))
    import cmake
    import pybind11

    command = [
        str(Path(cmake.CMAKE_BIN_DIR) / "cmake"),
        *("-S", str(ROOT)),
        *("-B", str(tmp_path / "build")),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSKBUILD_PROJECT_VERSION=0",
        "-DEXEUNT_NVCC=",
    ]
    # Without a ccache that the environment asks for, too: it is not among the tools.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CMAKE", "CUDA", "EXEUNT"))}
    done = subprocess.run(command, env={**clean, "PATH": str(tools), **env}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


needs_cmake = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("cmake", "pybind11"))),
    reason="needs cmake and pybind11 (pip install exeunt[test])",
)


@needs_cmake
@pytest.mark.slow
def test_insisting_on_cuda_without_a_compiler_fails_with_one_sentence(tmp_path):
    code, said = configure(tmp_path, EXEUNT_CUDA="ON")
    assert code != 0
    assert "EXEUNT_CUDA=ON but no CUDA compiler was found: put nvcc on PATH or set" in " ".join(said.split())


@needs_cmake
@pytest.mark.slow
def test_an_unknown_cuda_setting_is_refused(tmp_path):
    code, said = configure(tmp_path, EXEUNT_CUDA="MAYBE")
    assert code != 0 and "EXEUNT_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in said


@needs_cmake
@pytest.mark.slow
def test_cuda_off_configures(tmp_path):
    code, said = configure(tmp_path, EXEUNT_CUDA="OFF")
    assert code == 0 and "exeunt: CUDA module: OFF" in said, said
