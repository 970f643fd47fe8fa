#!/usr/bin/env bash
# On a machine with a GPU, offline: build for it, test on it, check memory accesses, benchmark.
#
#   benchmarks/gpu.sh [FILE]    the tables go to FILE, default benchmarks/results/cuda.md
#
# Needs torch with CUDA, nvcc, scikit-build-core, pybind11, cmake, ninja, pytest and scipy installed. Peers (Liger, Cut
# Cross-Entropy, FlashInfer) are measured where they are installed.
#
# Less than nine minutes: what each part may take adds up to 530 s. A part that fails or runs out of its time is named at
# the end and does not keep the others from running; without a build there is nothing to run.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/cuda.md}
failed=()
part() {  # SECONDS NAME COMMAND...
  local seconds=$1 name=$2
  shift 2
  printf '\n==== %s (%d s so far, at most %d)\n' "$name" "$SECONDS" "$seconds"
  timeout "$seconds" "$@" || failed+=("$name (status $?)")
}

CUDAARCHS=$(python -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}{b}{\"a\" * (a == 9)}-real')")
export CUDAARCHS EXEUNT_CUDA=ON
part 100 build python -m pip install -q --no-build-isolation --no-deps .
[ ${#failed[@]} -eq 0 ] || exit 1
python -m exeunt info

part 80 tests python -m pytest -q -m gpu tests/ops tests/test_on_device.py tests/test_graphs_on_device.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    part 20 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=exeunt \
      python benchmarks/bench_cuda.py --small
  done
else
  echo "skipped: no compute-sanitizer on PATH"
fi
part 150 benchmark python benchmarks/bench_cuda.py --out "$results"
part 60 step python benchmarks/bench_cuda_step.py --out "$results"
part 60 attach python benchmarks/bench_cuda_attach.py --out "$results"
printf '\n==== done (%d s): %s\n' "$SECONDS" "${failed[*]:-nothing failed}"
[ ${#failed[@]} -eq 0 ]
