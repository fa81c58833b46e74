"""The loader where something is scarce or forbidden: it works, or one line says which limit it is."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from coordlfs_tools.lab.processes import is_alive
from loader_jobs import eventually, workers_of

# Batches of 8 MB, by torch's own collate function, one that calls it, and one that stacks by itself.
JOB = """
import os, resource, sys
import torch
from coordlfs_loader import CoordinatedLoader
from torch.utils.data import default_collate

class D:
    def __len__(self): return 24
    def __getitem__(self, index): return {"x": torch.full((250_000,), index)}

def calls(samples): return default_collate(samples)
def stacks(samples): return {"x": torch.stack([sample["x"] for sample in samples])}
def few(number):
    limit = len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

for collate in (None, calls, stacks):
    init = few if "few" in sys.argv else None
    loader = CoordinatedLoader(D(), 4, group="limits", num_workers=2, collate_fn=collate, worker_init_fn=init)
    got = [batch["x"][:, -1].tolist() for batch in loader]
    assert got == [[i, i + 1, i + 2, i + 3] for i in range(0, 24, 4)], got
    if "wait" in sys.argv:
        kept = next(iter(loader))
        print("waits", flush=True)
        sys.stdin.read()
    loader.close()
print("right")
"""


def start(
    tmp_path: Path, *arguments: str, before: tuple[str, ...] = (), prepare: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return subprocess.Popen(
        [*before, sys.executable, path, *arguments],
        env={**os.environ, "COORDLFS_RUNTIME_DIR": os.fspath(tmp_path / "run"), "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    )


def said(job: subprocess.Popen[str]) -> str:
    """The last line of a job that has ended."""
    out, err = job.communicate(timeout=400)
    assert job.returncode == (0 if out else 1), err
    return (out or err).strip().splitlines()[-1]


def _limit(kind: int, soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (soft, hard))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_shared_memory_is_not_used(tmp_path: Path) -> None:
    """Containers have a /dev/shm of 64 MB; here it holds not even one batch."""
    small = 'mount --make-rprivate / && mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    assert said(start(tmp_path, before=("unshare", "-m", "sh", "-c", small, "sh"))) == "right"


def test_a_soft_limit_of_the_job_is_not_that_of_the_group(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    assert said(start(tmp_path, prepare=_limit(resource.RLIMIT_FSIZE, 1 << 20, hard))) == "right"


@pytest.mark.parametrize(("limit", "needed"), [(1 << 20, "8,[0-9]{3},[0-9]{3}"), (16, "[0-9]{2,3}")])
def test_a_limit_of_file_sizes_is_named(tmp_path: Path, limit: int, needed: str) -> None:
    line = said(start(tmp_path, prepare=_limit(resource.RLIMIT_FSIZE, limit, limit)))
    assert re.search(f"memory needs {needed} bytes, and a file may have {limit:,} at most. .*`ulimit -f", line), line


def test_a_worker_without_descriptors_is_an_error(tmp_path: Path) -> None:
    job = start(tmp_path, "few")
    _, err = job.communicate(timeout=400)
    assert job.returncode == 1
    assert "NoDescriptors: Caught NoDescriptors in CoordinatedLoader worker process" in err
    assert "no descriptor is left" in err
    assert "`ulimit -n`" in err


def _forbid_pidfd_open() -> None:
    """As the seccomp filters of older container runtimes do."""
    errno_, allow = 0x00050000 | errno.EPERM, 0x7FFF0000
    load, equal, give = 0x20, 0x15, 0x06
    code = [(load, 0, 0, 0), (equal, 0, 1, 434), (give, 0, 0, errno_), (give, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
    try:
        os.pidfd_open(os.getpid())
    except PermissionError:
        return
    raise AssertionError("it is not forbidden")


def test_workers_end_with_their_job_where_pidfds_are_forbidden(tmp_path: Path) -> None:
    job = start(tmp_path, "wait", prepare=_forbid_pidfd_open)
    assert job.stdout is not None
    assert job.stdout.readline() == "waits\n"
    workers = workers_of(job.pid)
    assert len(workers) == 2
    job.send_signal(signal.SIGKILL)
    try:
        eventually(lambda: not any(map(is_alive, workers)), seconds=100)
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
    job.communicate()
    eventually(lambda: not list((tmp_path / "run").glob("*.sock")))
