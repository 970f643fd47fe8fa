#!/usr/bin/env bash
# On a machine with a GPU, offline: build for it, test on it, check memory accesses, benchmark.
#
#   benchmarks/gpu.sh [FILE]    the table goes to FILE, default benchmarks/results/cuda.md
#
# Needs torch with CUDA, nvcc, scikit-build-core, pybind11, cmake, ninja, pytest and scipy installed. Peers (Liger, Cut
# Cross-Entropy, FlashInfer) are measured where they are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/cuda.md}
step() { printf '\n==== %s (%d s)\n' "$1" "$SECONDS"; }

step "build"
CUDAARCHS=$(python -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}{b}{\"a\" * (a == 9)}-real')")
export CUDAARCHS EXEUNT_CUDA=ON
python -m pip install -q --no-build-isolation --no-deps .
python -m exeunt info

step "tests"
python -m pytest -q -m gpu tests/ops/test_exit_stats.py tests/ops/test_exit_stats_variants.py \
  tests/ops/test_exit_stats_device.py

step "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=exeunt python benchmarks/bench_cuda.py --small
  done
else
  echo "skipped: no compute-sanitizer on PATH"
fi

step "benchmark"
python benchmarks/bench_cuda.py --out "$results"
step "done"
