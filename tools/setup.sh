#!/bin/sh
# Installs what coordlfs needs to be built, tested and shown on Debian or Ubuntu: system packages, and an environment
# of its own (COORDLFS_VENV, by default .venv in the checkout) with this checkout in it. What is there is left alone.
set -eu
cd "$(dirname "$0")/.."
venv=${COORDLFS_VENV:-.venv}
torch=torch==2.13.0+cpu # to the byte: any other choice downloads gigabytes of CUDA

fail() {
    echo "tools/setup.sh: $1" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

find_python() { # the first Python that is new enough
    for python in python3.11 python3.12 python3.13 python3.14 python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$python" && return
    done
    return 1
}

missing_packages() {
    has cc || echo gcc libc6-dev
    has pkg-config || echo pkg-config
    has fusermount3 || echo fuse3
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    # What only the tests call:
    has fio || echo fio
    has getfattr || echo attr
    has setfacl || echo acl
    has ip || echo iproute2
    has etcd || echo etcd-server
    has openssl || echo openssl
    has chromium || echo chromium
    has pdftoppm || echo poppler-utils
    has mkfs.xfs || echo xfsprogs
    has mkfs.btrfs || echo btrfs-progs
    if python=$(find_python); then
        # The name of the package has the version only where there is more than one Python.
        "$python" -c '
import importlib.util, os, sys, sysconfig
name = "python%d.%d" % sys.version_info[:2]
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")): print(name + "-dev")
if importlib.util.find_spec("ensurepip") is None: print(name + "-venv")'
    else
        echo python3 python3-dev python3-venv
    fi
}

install_packages() { # as words
    as_root=
    if [ "$(id -u)" != 0 ]; then
        as_root=sudo
        has sudo || fail "these packages are missing, and only root may install them: apt-get install $*"
    fi
    has apt-get || fail "these packages are missing (as Debian calls them), and there is no apt-get: $*"
    echo "installing $*"
    $as_root apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

packages=$(missing_packages)
# shellcheck disable=SC2086
[ -z "$packages" ] || install_packages $packages
python=$(find_python) || fail "there is no Python 3.11 or later, and this system's packages have none"

# Installed once for each place, and each state of the project's dependencies and of what is compiled.
wanted=$({ pwd; cat pyproject.toml tools/setup.sh coordlfs/*/*.pyx coordlfs/*/*.pxd; } | cksum)
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/coordlfs-setup" 2>/dev/null)" != "$wanted" ]; then
    echo "installing coordlfs and what it needs in $venv: this takes minutes"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -qq "$torch" 2>/dev/null ||
        "$venv/bin/pip" install -qq "$torch" --index-url https://download.pytorch.org/whl/cpu
    "$venv/bin/pip" install -qq --editable '.[cluster,loader,objects,tools,test,docs]'
    echo "$wanted" >"$venv/coordlfs-setup"
fi
