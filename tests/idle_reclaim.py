"""A plugin of pytest: a test that counts pages is run again if it counted wrong while the machine took some of them.

Clouds set up DAMON to take back memory that looks idle, however much of it is free. It judges by regions of physical
memory, so that pages that were read a moment ago go as well if what lay around them was idle: seen here at one page of
a mount in 26 runs of a test that kills a keeper and wants nothing read again. Such a test has counted rightly and still
fails. The kernel says which pages DAMON took; a test that failed without that has failed.

It needs root and tracefs. Without them, or without DAMON, tests fail as they do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from coordlfs.kernel import mounts

_TRACEFS = Path("/sys/kernel/tracing")
_EVENT = Path("events/filemap/mm_filemap_delete_from_page_cache")
_NO_DISK = 1 << 20  # below it are the devices of major number 0: of FUSE, among others


class PagesTaken(Exception):
    """A test failed, and pages of its mounts were taken as it ran: it is run again (`--only-rerun` names this)."""


class _Watch:
    """A trace of what DAMON's threads remove from the page cache."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def clear(self) -> None:
        self._trace.write_text("")

    def taken_from(self, devices: set[str]) -> int:
        """How many times pages of one of `devices` (MAJOR:MINOR) were taken since the last `clear`."""
        return sum(device in devices for device in re.findall(r"dev (\d+:\d+) ino", self._trace.read_text()))


def _daemons() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if entry.read_bytes().startswith(b"kdamond"):
                found.append(int(entry.parent.name))
    return found


def _fuse_devices() -> set[str]:
    """MAJOR:MINOR of every FUSE file system that is mounted."""
    devices = [mount.device for mount in mounts.table() if mount.fstype.startswith(b"fuse")]
    return {f"{os.major(device)}:{os.minor(device)}" for device in devices}


@contextmanager
def _watching(daemons: list[int]) -> Iterator[_Watch | None]:
    """A watch, or None where the kernel allows none."""
    instance = _TRACEFS / "instances" / f"coordlfs-tests-{os.getpid()}"
    try:
        with suppress(FileExistsError):  # left by a process that was killed
            instance.mkdir()
        pids = " || ".join(f"common_pid == {pid}" for pid in daemons)
        (instance / _EVENT / "filter").write_text(f"({pids}) && s_dev < {_NO_DISK}")
        (instance / _EVENT / "enable").write_text("1")
        watch = _Watch(instance / "trace")
    except OSError:
        watch = None
    try:
        yield watch
    finally:
        with suppress(OSError):
            instance.rmdir()


_WATCH = pytest.StashKey[_Watch | None]()


@pytest.fixture(scope="session", autouse=True)
def _idle_reclaim_is_watched(pytestconfig: pytest.Config) -> Iterator[None]:
    daemons = _daemons()
    if os.geteuid() or not daemons or not (_TRACEFS / _EVENT).exists():
        yield
        return
    with _watching(daemons) as watch:
        if watch is not None:
            pytestconfig.stash[_WATCH] = watch
        yield
        pytestconfig.stash[_WATCH] = None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What was taken before does not concern this test."""
    if watch := item.config.stash.get(_WATCH, None):
        watch.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Says so where pages were taken from a test that did not find what it counted."""
    try:
        return (yield)
    except AssertionError as e:
        watch = item.config.stash.get(_WATCH, None)
        if watch and (taken := watch.taken_from(_fuse_devices())):
            raise PagesTaken(f"the machine took pages of mounts {taken} times while this ran") from e
        raise
