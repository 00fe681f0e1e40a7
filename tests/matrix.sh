#!/usr/bin/env bash
# Two wheels, each built once, unchanged through the whole test suite on several versions of torch: bash tests/matrix.sh
#   python3      built against torch 2.13.0, run with 2.10.0, 2.11.0, 2.13.0 and the newest, which is what pip takes by itself
#   python3.12   built against torch 2.11.0, the first whose own copy of pybind11 refuses the stable ABI; run with it
# bash tests/matrix.sh 2.12.0 newest    the first wheel with these versions, and no other
# TESTS="tests/test_options.py" runs these alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An interpreter that runs: pyenv has a python3.12 on the PATH that does not where another version is chosen.
find_python() { # version
  local python
  for python in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"[.-]*/bin/python3; do
    if [ -x "$python" ] && "$python" -c "import sys, venv; sys.exit(sys.version_info[:2] != tuple(map(int, '$1'.split('.'))))"; then
      echo "$python"
      return
    fi
  done 2>/dev/null
  return 1
}

wheel_through() { # interpreter, torch to build against, versions of torch to run with
  local python=$1 build=$2 folder version torch venv wheel
  shift 2
  folder=$(mktemp -d -p "$work")
  "$python" -m venv "$folder/build"
  "$folder/build/bin/pip" install -q "torch==$build"
  rm -rf build
  "$folder/build/bin/pip" wheel -q --no-deps -w "$folder" .
  rm -rf "$folder/build"
  wheel=$(echo "$folder"/*.whl)
  sha256sum "$wheel"
  for version in "$@"; do
    venv=$folder/$version
    "$python" -m venv "$venv"
    if [ "$version" = newest ]; then torch=torch; else torch="torch==$version"; fi
    "$venv/bin/pip" install -q "$torch" "$wheel[test]"
    "$venv/bin/python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
    # shellcheck disable=SC2086  # several files
    "$venv/bin/pytest" -q -p no:cacheprovider ${TESTS:-tests} | tail -n 3
    rm -rf "$venv"
  done
}

if [ $# -gt 0 ]; then
  wheel_through python3 2.13.0 "$@"
  exit
fi
newer=$(find_python 3.12) || newer=
[ -n "$newer" ] || echo "tests/matrix.sh: no python3.12 on the PATH or in pyenv's versions; its half will be missing" >&2
wheel_through python3 2.13.0 2.10.0 2.11.0 2.13.0 newest
if [ -z "$newer" ]; then
  echo "tests/matrix.sh: not run under Python 3.12, as there is none" >&2
  exit 1
fi
wheel_through "$newer" 2.11.0 2.11.0
