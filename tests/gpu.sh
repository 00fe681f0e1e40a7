#!/usr/bin/env bash
# What needs a GPU, in four calls of less than ten minutes each, the most valuable first:
#   OUT=folder bash tests/gpu.sh A    the build for this card alone; the tests of each kernel, in processes of their own
#   OUT=folder bash tests/gpu.sh B    what the kernels wait for (ncu), and a short table of times
#   OUT=folder bash tests/gpu.sh C    the benchmarks, group by group
#   OUT=folder bash tests/gpu.sh D    compute-sanitizer
# Several letters are several calls, no letter is all four. It needs a CUDA build of torch, nvcc and what the `test` extra asks
# for. Nothing is downloaded or installed: the extension is built in place, and built again only where something changed.
#
# A step has a limit, at which it and its children are ended; it stops no other step, and what it printed and measured until
# then is kept. A call leaves two files in $OUT, written anew after each step: A.txt says how the steps ended, A.tar.gz (of 15
# MiB at most) has what they printed and measured. What is printed last is the first failure.
#
# PYTHON: the interpreter. ONLY: which steps of A, C or D, a regular expression. JOBS: tests side by side. CALL_SECONDS: for one
# call.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu_results}
side_by_side=${JOBS:-6}
call_seconds=${CALL_SECONDS:-560}
most_bytes=${MOST_BYTES:-15728640}
kill_after=${KILL_AFTER:-10}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Steps -----------------------------------------------------------------------------------------------------------------

wanted() { [[ $1 =~ ${ONLY:-.} ]]; }

# run NAME SECONDS COMMAND ... is a step, and fails where the command does, or where `needs`, a regular expression, is set and
# no line that it printed matches. start is the same beside others; finish waits for those.
run() {
  number=$((number + 1))
  attempt "$@"
  local rc=$?
  pack
  return $rc
}

start() {
  while (($(jobs -rp | wc -l) >= side_by_side)); do
    wait -n
    pack
  done
  number=$((number + 1))
  attempt "$@" &
}

finish() {
  wait
  pack
}

attempt() {
  local name=$1 limit=$2 left=$((ends - SECONDS)) began=$SECONDS rc=0 how=ok
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 1)); then
    how="not run, the call's time was up" rc=1
  else
    timeout -k "$kill_after" "$limit" "$@" >"$work/$name.txt" 2>&1 || rc=$?
    case $rc in
      0)
        if [ -n "${needs-}" ] && ! grep -Eq "$needs" "$work/$name.txt"; then
          how="failed, no line matches $needs" rc=1
        fi
        ;;
      *) how="failed, rc $rc" ;;
    esac
    case $rc in 124 | 137) ((SECONDS - began < limit)) || how="failed, ended at its limit of $limit s" ;; esac
  fi
  printf '%-32s %s (%d s)\n' "$name:" "$how" $((SECONDS - began)) | tee "$state/$(printf '%03d' "$number")"
  return $rc
}

# What there is until now, into the two files of the call. What does not fit is left out, the largest first.
pack() {
  local largest
  cat "$state"/* >"$out/$call.txt" 2>/dev/null
  while tar -czf "$out/.$call.tar.gz" --warning=no-file-changed -C "$work" .; [ -f "$out/.$call.tar.gz" ]; do
    (($(stat -c %s "$out/.$call.tar.gz") > most_bytes)) || break
    largest=$(find "$work" -type f -printf '%s %P\n' | sort -rn | head -n 1)
    echo "$largest" >>"$work/left_out.txt"
    rm -f "$work/${largest#* }"
  done
  mv -f "$out/.$call.tar.gz" "$out/$call.tar.gz"
}

# The first step that failed: the first failure that pytest shows, or the end of what it printed.
first_failure() {
  local name shown
  name=$(grep -m 1 ' failed, ' "$out/$call.txt") || return
  name=${name%%:*}
  echo "-- first failure: $name"
  shown=$(awk '/^_+ .* _+$/ { if (seen++) exit } /^=+ .* =+$/ && seen { exit } seen' "$work/$name.txt" | head -n 80)
  [ -n "$shown" ] && echo "$shown" || tail -n 30 "$work/$name.txt"
}

# The calls -------------------------------------------------------------------------------------------------------------

build() {
  run machine 60 bash -c 'nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; nvcc --version | tail -n 2
    '"$python"' -c "import torch; print(\"torch\", torch.__version__)"; git log -1 --format="commit %H %s" 2>/dev/null; true'
  # Source lines for ncu in each call, so that none has to build anew.
  FASTFOCAL_CUDA=1 FASTFOCAL_LINEINFO=1 TORCH_CUDA_ARCH_LIST=$arch run build 300 "$python" setup.py -q egg_info build_ext --inplace &&
    needs="'cuda_archs': \\['$arch'\\]" run built 120 "$python" -c "import fastfocal; print(fastfocal.build_info())"
}

A() {
  build || return
  local pytest=("$python" -m pytest -m cuda -q --maxfail=5 --tb=short -p no:cacheprovider) file name
  # Which files have tests for a GPU; those of host packages, of the demo and of this script are not even read.
  run collect 120 "$python" -m pytest -m cuda --collect-only -q -p no:cacheprovider tests --ignore-glob='*/test_compat_*' \
    --ignore=tests/test_demo.py --ignore=tests/test_gpu_script.py
  local needs='[1-9][0-9]* passed'
  export OMP_NUM_THREADS=2
  kernels() { ! wanted "kernels_$1" || start "kernels_$1" 300 "${pytest[@]}" tests/test_kernels.py -k "$2"; }
  kernels float32 "not float16 and not float64"
  kernels bfloat16 bfloat16
  kernels float16 "float16 and not bfloat16"
  kernels float64 float64
  for file in $(sed -n 's/^\(tests\/test_[^:]*\.py\):.*/\1/p' "$work/collect.txt" | sort -u); do
    name=$(basename "${file#tests/test_}" .py)
    [ "$name" = kernels ] || ! wanted "$name" || start "$name" 300 "${pytest[@]}" "$file"
  done
  finish
  unset OMP_NUM_THREADS
}

B() {
  build || return
  local order metrics="dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,gpu__time_duration.sum"
  metrics+=",smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active"
  metrics+=",launch__registers_per_thread"
  for order in contiguous channels_last; do
    run "ncu_fast_$order" 90 ncu --clock-control none --kernel-name regex:fast_kernel --metrics "$metrics" \
      "$python" tests/gpu/calls.py --large --order $order
    tail -n 60 "$work/ncu_fast_$order.txt"
  done
  run ncu_others 90 ncu --clock-control none --kernel-name 'regex:pack_labels_kernel|reduce_kernel|scale_kernel' \
    --metrics "$metrics" "$python" tests/gpu/calls.py --large --order contiguous
  run times 200 "$python" -m pytest benchmarks --benchmark-only --device=cuda -q -p no:cacheprovider \
    --benchmark-json="$work/times.json" --benchmark-max-time=0.3 -k "800x1344 and (fastfocal or copy) and not copy_into"
  report
  run ncu_sources 120 ncu --clock-control none --kernel-name regex:fast_kernel --set full --import-source yes \
    --export "$work/fast" "$python" tests/gpu/calls.py --large --dtype bfloat16
}

# Name, seconds, which benchmarks: every one is in one of them.
benchmark_groups=(
  "main_float32 150 800x1344-float32-nchw and not autotune"
  "main_16_bit 100 (800x1344-bfloat16 or 800x1344-float16)"
  "main_other_orders 100 800x1344-float32 and not nchw"
  "small 100 test_small_work"
  "large 120 800x800-"
  "scaling 100 test_number_of_logits"
  "levels 60 test_number_of_levels"
  "huge 150 800x800_K264"
  "autotune 150 autotune"
)

C() {
  build || return
  local name seconds rows spare=$((call_seconds / 20))  # for the report
  ends=$((ends - spare))
  for group in "${benchmark_groups[@]}"; do
    read -r name seconds rows <<<"$group"
    wanted "$name" || continue
    run "$name" "$seconds" "$python" -m pytest benchmarks --benchmark-only --device=cuda -q -p no:cacheprovider \
      --benchmark-json="$work/$name.json" --benchmark-max-time=0.5 -k "$rows"
  done
  ends=$((ends + spare))
  report
}

# Of what was measured, in a step that may have been ended too.
report() {
  local saved
  saved=$(find "$work" -maxdepth 1 -name '*.json' -size +0)
  [ -n "$saved" ] || return
  # shellcheck disable=SC2086  # several files
  run report 60 "$python" -m benchmarks.report $saved --out "$work/report" && sed '1,/^## /!b;/^## /!d' "$work/report/report.md"
}

# One allocation a tensor, so that a step beyond its end is seen. initcheck has to see torch's kernels write what ours read.
D() {
  build || return
  local part tool
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck "racecheck --kernel-regex kns=fastfocal" initcheck "synccheck --kernel-regex kns=fastfocal"; do
    for part in float32 float16 bfloat16 float64 other; do
      wanted "${tool%% *}_$part" || continue
      # shellcheck disable=SC2086  # a tool and its option
      start "${tool%% *}_$part" 240 compute-sanitizer --tool $tool --error-exitcode 9 \
        "$python" tests/gpu/calls.py --part "$part"
    done
  done
  finish
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# -----------------------------------------------------------------------------------------------------------------------

[ $# -gt 0 ] || set -- A B C D
for call in "$@"; do
  case $call in
    A | B | C | D) ;;
    *)
      echo "tests/gpu.sh: no call $call: expected A, B, C or D" >&2
      exit 2
      ;;
  esac
done
arch=$(timeout -k 10 120 "$python" -c "import torch
print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')")
if [ -z "$arch" ]; then
  echo "tests/gpu.sh: torch of $python sees no CUDA device" >&2
  exit 1
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for call in "$@"; do
  echo "== $call"
  work=$scratch/$call/work state=$scratch/$call/state number=0 ends=$((SECONDS + call_seconds))
  mkdir -p "$work" "$state"
  "$call"
  echo "$number" >"$scratch/$call/steps"
done
failed=0
for call in "$@"; do
  echo "== $call"
  cat "$out/$call.txt"
  # Each step has its line, and each line says ok.
  [ "$(grep -cE ' ok \([0-9]+ s\)$' "$out/$call.txt")" = "$(cat "$scratch/$call/steps")" ] || failed=1
  grep -qvE ' ok \([0-9]+ s\)$' "$out/$call.txt" && failed=1
done
for call in "$@"; do
  work=$scratch/$call/work
  first_failure
done
exit $failed
