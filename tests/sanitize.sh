#!/usr/bin/env bash
# The CPU extension under sanitizers: bash tests/sanitize.sh [address] [thread] (both, where none is named).
#   address: AddressSanitizer and UndefinedBehaviorSanitizer, through the kernels' tests, on every instruction set
#   thread:  ThreadSanitizer, over Python threads that call the loss at once
# Any report fails. Needs GCC, an environment in which fastfocal and its test extra are installed, ninja and pybind11.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
[ $# -gt 0 ] || set -- address thread
python=${PYTHON:-python3}
cxx=${CXX:-g++}
library() { readlink -f "$("$cxx" -print-file-name="$1")"; }

# The extension with these flags, and beside it the package's Python files: build/sanitize/$1/lib
build() {
  local folder=$root/build/sanitize/$1
  rm -rf "$folder/lib" && mkdir -p "$folder/lib/fastfocal"
  FASTFOCAL_CUDA=0 FASTFOCAL_CXXFLAGS="$2 -O1 -g1 -fno-omit-frame-pointer -w" "$python" setup.py -q build_ext \
    --build-lib "$folder/lib" --build-temp "$folder/objects"
  for path in "$root"/fastfocal/*; do
    case $path in *.so) ;; *) ln -s "$path" "$folder/lib/fastfocal/" ;; esac
  done
}

# Whose extension is loaded, from a folder that has no other
check() {
  (cd "$root/build/sanitize/$variant" && "$python" -c \
    "import fastfocal._C as c; assert 'build/sanitize/$variant' in c.__file__, c.__file__")
}

# pytest from elsewhere, so that the checkout's own package is not the one that is imported; it must not catch a report
tests() {
  (cd "$root/build/sanitize/$variant" && "$python" -m pytest -q --capture=sys -p no:cacheprovider -c "$root/pyproject.toml" \
    --rootdir "$root" "${@/#tests\//$root/tests/}")
}

address() {
  # Of undefined behaviour what AddressSanitizer does not see; and its checks as calls, as all of them written out take ten
  # times as long to compile.
  build address "-fsanitize=address,signed-integer-overflow,shift,integer-divide-by-zero,bounds,bool,enum,return,unreachable \
    -fno-sanitize-recover=all --param=asan-instrumentation-with-call-threshold=0"
  # Python and torch leak on purpose; torch is not linked with the sanitizers, which must therefore come first, and after
  # them the C++ library whose exceptions they watch.
  export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1
  export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
  export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
  check
  local kernels="(layouts or every_tail or short_planes or label_forms or integer_dtypes or sizes or soft_targets \
    or unreduced or conventions or weight_forms or divisors or modes) and not cuda"
  for isa in AVX512 AVX2 default; do
    echo "address and undefined behaviour: $isa"
    FASTFOCAL_CPU_CAPABILITY=$isa tests tests/test_kernels.py tests/test_options.py -k "$kernels"
  done
  local others=(test_labels test_errors test_grad_modes test_edges test_operator_checks)
  for i in "${!others[@]}"; do
    [ -f "tests/${others[$i]}.py" ] && others[$i]=tests/${others[$i]}.py || unset "others[$i]"
  done
  tests "${others[@]}" -k "not cuda and not out_of_memory"  # which ends the process under AddressSanitizer
  (cd build/sanitize/address && "$python" "$root/tests/fuzz.py" --seed 1 --examples 200)
}

thread() {
  build thread -fsanitize=thread
  "$cxx" -std=c++17 -O1 -g -fPIC -shared -fsanitize=thread tests/sanitizers/threads.cpp \
    -o build/sanitize/thread/threads.so
  export TSAN_OPTIONS=halt_on_error=1:suppressions=$root/tests/sanitizers/thread.supp
  export LD_PRELOAD="$(library libtsan.so) $root/build/sanitize/thread/threads.so"
  check
  for isa in AVX512 AVX2 default; do
    echo "threads: $isa"
    (cd build/sanitize/thread && FASTFOCAL_CPU_CAPABILITY=$isa "$python" "$root/tests/sanitizers/call_from_threads.py")
  done
}

for variant in "$@"; do
  started=$SECONDS
  (
    export PYTHONPATH="$root/build/sanitize/$variant/lib"
    "$variant"
  )
  echo "$variant: no report, $((SECONDS - started)) s"
done
