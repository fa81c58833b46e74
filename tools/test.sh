#!/bin/sh
# Installs what is missing, then runs every test: those that mount or look at the whole machine one after the other, the
# rest beside them. Arguments go to pytest, with paths as seen from the checkout.
set -eu
cd "$(dirname "$0")/.."
sh tools/setup.sh
PATH=$(cd "${COORDLFS_VENV:-.venv}" && pwd)/bin:$PATH
exec python -m pytest -n 2 --dist loadgroup "$@"
