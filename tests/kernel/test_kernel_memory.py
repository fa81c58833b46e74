"""The memory that a process may use, as the kernel enforces it in real cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import PATIENCE, Cgroup, script

from coordlfs.kernel import cgroups
from coordlfs.kernel.memory import memory

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups needs root")


def meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def test_there_is_no_more_than_the_machine_has() -> None:
    have = memory()
    assert 0 < have.available <= have.total <= meminfo("MemTotal")
    assert have.available <= meminfo("MemAvailable") + 256 * MIB


REPORT = """
from coordlfs.kernel.memory import memory
print(memory().total, memory().available)
"""


@needs_root
def test_the_limit_of_a_cgroup_is_all_there_is(cgroup: Callable[[int], Cgroup]) -> None:
    group = cgroup(300 * MIB)
    total, available = map(int, script(REPORT, preexec_fn=group.enter).split())
    assert total == 300 * MIB
    assert 200 * MIB < available <= total


@needs_root
@pytest.mark.parametrize(("above", "below"), [(200, 300), (300, 200)])
def test_the_lowest_limit_on_the_way_up_counts(cgroup: Callable[[int], Cgroup], above: int, below: int) -> None:
    group = cgroup(above * MIB)
    (inner := group.path / "inner").mkdir()
    try:
        if (group.path / "cgroup.subtree_control").exists():
            (group.path / "cgroup.subtree_control").write_text("+memory")
        limit = "memory.max" if (inner / "memory.max").exists() else "memory.limit_in_bytes"
        (inner / limit).write_text(str(below * MIB))
        report = script(REPORT, preexec_fn=lambda: (inner / "cgroup.procs").write_text("0"))
        assert int(report.split()[0]) == 200 * MIB
    finally:
        inner.rmdir()


FILL = """
import os, sys
from coordlfs.kernel.memory import memory
before = memory().available
held = b"x" * (100 << 20)
print(before - memory().available)
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
for _ in range(60):
    os.write(fd, held[:1 << 20])
os.fsync(fd)
print(before - memory().available)
"""


@needs_root
def test_memory_in_use_is_not_available_and_page_cache_is(cgroup: Callable[[int], Cgroup], source: Path) -> None:
    used, with_a_file_cached = map(int, script(FILL, source / "f", preexec_fn=cgroup(300 * MIB).enter).split())
    assert 90 * MIB < used < 115 * MIB
    assert with_a_file_cached < 130 * MIB


@needs_root
def test_processes_of_one_memory_cgroup_are_told_from_others(cgroup: Callable[[int], Cgroup]) -> None:
    group = cgroup(300 * MIB)
    others = []
    try:
        for enter in (group.enter, group.enter, None):
            command = [sys.executable, "-c", "input()"]
            others.append(subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=enter))
        first, second, outside = (cgroups.of_memory(process.pid) for process in others)
        assert first == second
        assert first is not None
        assert first.endswith(b"/" + os.fsencode(group.path.name))
        assert outside == cgroups.of_memory(os.getpid()) != first
    finally:
        for process in others:
            process.communicate(b"\n", timeout=PATIENCE)
    assert cgroups.of_memory(others[0].pid) is None, "it is gone"
