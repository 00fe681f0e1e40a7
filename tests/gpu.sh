#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, with nvcc, a CUDA build of torch, and what the `test` extra asks for:
#   OUT=folder bash tests/gpu.sh [build] [test] [sanitize] [benchmark] [profile]
# All of these in this order where none is named. Nothing is downloaded. A step that fails stops no other; what each printed is
# in $OUT, and the last lines say how each ended. PYTHON=python3.12 names another interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu_results}
[ $# -gt 0 ] || set -- build test sanitize benchmark profile
if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "tests/gpu.sh: torch of $python sees no CUDA device" >&2
  exit 1
fi
mkdir -p "$out" || exit 1

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version | tail -n 2
  "$python" -c "import torch; print('torch', torch.__version__)"
  git log -1 --format='commit %H %s' 2>/dev/null
}

build() {
  "$python" -m pip install --no-build-isolation --no-deps . &&
    (cd / && "$python" -c "import fastfocal; info = fastfocal.build_info(); print(info); assert info['cuda']")
}

test() {
  "$python" -c "from fastfocal import _C; print(_C.__file__)" &&  # the checkout's own build, if it has one
    "$python" -m pytest -m cuda -q -p no:cacheprovider tests
}

# One allocation a tensor, so that a step beyond its end is seen. initcheck has to see torch's kernels write what ours read.
sanitize() {
  local failed=0
  for tool in memcheck "racecheck --kernel-regex kns=fastfocal" "synccheck --kernel-regex kns=fastfocal" initcheck; do
    echo "== $tool"
    # shellcheck disable=SC2086  # a tool and its option
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" tests/gpu_calls.py || failed=1
  done
  return $failed
}

benchmark() {
  "$python" -m pytest --benchmark-only --device=cuda --benchmark-json="$out/benchmarks.json" -q &&
    "$python" -m benchmarks.report "$out/benchmarks.json" --out "$out/report"
}

# What the main kernels wait for: memory, or their own instructions.
profile() {
  ncu --clock-control none --kernel-name regex:plain_kernel --metrics \
    dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,smsp__issue_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active \
    "$python" tests/gpu_calls.py --large
}

ended=""
machine 2>&1 | tee "$out/machine.txt"
for step in "$@"; do
  case $step in
    build | test | sanitize | benchmark | profile) ;;
    *)
      echo "tests/gpu.sh: no step $step" >&2
      exit 2
      ;;
  esac
  echo "== $step"
  "$step" 2>&1 | tee "$out/$step.txt"
  ended+="$step: rc ${PIPESTATUS[0]}"$'\n'
done
printf '%s' "$ended" | tee "$out/ended.txt"
! grep -qv "rc 0$" "$out/ended.txt"
