#!/bin/sh
# Installs what is missing, then runs every test, or the layers that are named first:
#   sh tools/test.sh                all of them
#   sh tools/test.sh pure kernel    no mount, no root; what needs Linux
# The layers are the folders of tests/. Whatever follows their names goes to pytest, with paths as seen from the checkout.
set -eu
cd "$(dirname "$0")/.."
sh tools/setup.sh
PATH=$(cd "${COORDLFS_VENV:-.venv}" && pwd)/bin:$PATH
layers=
while [ $# -gt 0 ] && [ -d "tests/$1" ]; do
    layers="$layers tests/$1"
    shift
done
# Twice as many workers as processors: half of what the tests do is waiting. In the order of tests/conftest.py.
# shellcheck disable=SC2086
exec python -m pytest -n $((2 * $(nproc))) --dist loadgroup --no-loadscope-reorder $layers "$@"
