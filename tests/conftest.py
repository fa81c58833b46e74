"""Fixtures of the tests that mount: each takes down what it put up, and fails the test if something stays."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import idle_reclaim
import pytest
from mounts import Cgroup, MakeMount, Mount, coordlfs, unmount_lazily

# What may run beside any other: it passes while the page cache is emptied all the time, and does nothing to the machine
# that another would notice; but for what is marked `alone`.
_ALONGSIDE = (
    *("analyze", "analyze_model", "catalog", "demo", "ends", "epochs", "examples", "exporter", "fuzz"),
    *("governor", "hinted_sampler", "hints", "items", "kernel_fuse", "kernel_paths", "loader", "loader_group"),
    *("loader_jobs", "logs", "store", "metrics", "minio", "mount_errors", "mount_lifecycle", "mount_tree"),
    *("ownership", "packaging", "peer_client", "peer_discovery", "peer_protocol", "services", "simulate", "sizes"),
    *("stash", "versions", "keeper_protocol"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(idle_reclaim)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that empty the page cache, count pages or need much memory take turns in one process."""
    for item in items:
        file = item.path.stem.removeprefix("test_")
        alongside = file in _ALONGSIDE and item.get_closest_marker("alone") is None
        # The others of a file stay together for what they share.
        item.add_marker(pytest.mark.xdist_group(file if alongside else "machine"))


@pytest.fixture(scope="module")
def _may_mount() -> None:
    if os.geteuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting needs root and /dev/fuse")


def _directory(prefix: str, beneath: str = "/var/tmp") -> Iterator[Path]:
    # Not below /tmp, which is memory in many places: the page cache of a disk is what is tested.
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=beneath)).resolve()
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def source() -> Iterator[Path]:
    """An empty directory on a disk, to be filled and mounted."""
    yield from _directory("coordlfs-source-")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """`source` on a file system in memory, where many files are quickly made and removed."""
    yield from _directory("coordlfs-source-", "/dev/shm")


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory for mountpoints and logs."""
    yield from _directory("coordlfs-place-")


def _mounts(place: Path) -> Iterator[MakeMount]:
    with ExitStack() as stack:
        count = 0

        def make(
            source: Path,
            cache: str = "64M",
            *options: object,
            mountpoint: Path | None = None,
            said: Callable[[str], None] = lambda text: None,
            inside: str | None = None,
        ) -> Mount:
            nonlocal count
            count += 1
            path = mountpoint or place / f"mnt{count}"
            log = place / f"log{count}"
            stack.callback(unmount_lazily, path)
            arguments = ["mount", source, path, "--cache-size", cache, "--log-file", log, *options]
            done = coordlfs(*arguments, status=None, inside=inside)
            said(done.stdout)
            assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
            mount = Mount(source, path, log)
            stack.callback(mount.end)
            return mount

        yield make


@pytest.fixture
def mount(source: Path, place: Path, _may_mount: None) -> Iterator[MakeMount]:
    """Mounts a directory; see `mounts.Mount`."""
    yield from _mounts(place)


@pytest.fixture
def cgroup() -> Iterator[Callable[[int], Cgroup]]:
    """Makes a memory cgroup with a limit in bytes."""
    with ExitStack() as stack:
        count = 0

        def make(limit: int) -> Cgroup:
            nonlocal count
            count += 1
            group = Cgroup(f"coordlfs-test-{os.getpid()}-{count}", limit)
            stack.callback(group.remove)
            return group

        yield make
