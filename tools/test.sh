#!/bin/sh
# Installs what is missing, then runs every test. Arguments go to pytest, with paths as seen from the checkout.
set -eu
cd "$(dirname "$0")/.."
sh tools/setup.sh
PATH=$(cd "${COORDLFS_VENV:-.venv}" && pwd)/bin:$PATH
exec python -m pytest "$@"
