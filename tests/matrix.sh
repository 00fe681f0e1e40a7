#!/usr/bin/env bash
# One wheel, built once, through the whole test suite on several versions of torch: bash tests/matrix.sh [version ...]
# ("newest" is what pip takes without a version).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- 2.10.0 2.13.0 newest
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q torch==2.13.0
rm -rf build
"$work/build/bin/pip" wheel -q --no-deps -w "$work" .
wheel=$(echo "$work"/*.whl)
sha256sum "$wheel"

for version in "$@"; do
  venv="$work/$version"
  python3 -m venv "$venv"
  if [ "$version" = newest ]; then torch=torch; else torch="torch==$version"; fi
  "$venv/bin/pip" install -q "$torch" "$wheel[test]"
  "$venv/bin/python" -c "import torch; print('torch', torch.__version__)"
  "$venv/bin/pytest" -q -p no:cacheprovider tests | tail -n 3
  rm -rf "$venv"
done
