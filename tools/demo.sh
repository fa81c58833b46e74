#!/bin/sh
# Shows what coordlfs gains: installs what is missing, then trains on photographs directly and on a mount, under the
# same memory limit. Leaves nothing behind but the environment. Arguments go to `python -m coordlfs_tools.demo`.
set -eu
if [ "$(id -u)" != 0 ]; then
    echo "demo.sh needs root, to mount, to limit memory and to install packages: sudo sh $0" >&2
    exit 1
fi
cd "$(dirname "$0")/.."
sh tools/setup.sh
PATH=$(cd "${COORDLFS_VENV:-.venv}" && pwd)/bin:$PATH
exec python -m coordlfs_tools.demo "$@"
