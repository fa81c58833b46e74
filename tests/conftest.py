"""Fixtures of the tests that mount: each takes down what it put up, and fails the test if something stays."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import idle_reclaim
import pytest
from coordlfs_tools.lab import cgroups
from mounts import Cgroup, MakeMount, Mount, coordlfs, unmount_lazily
from pins import MakePin, Pinned

from coordlfs.kernel import process

# Those that take long come first, so that no worker has one left when the others are done.
_LAYERS = ("whole", "loader", "analyser", "cluster", "mount", "kernel", "pure")


# An example may take as long as the machine is busy.
hypothesis.settings.register_profile("coordlfs", deadline=None)
hypothesis.settings.load_profile("coordlfs")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(idle_reclaim)
    if os.geteuid() == 0:
        # Each worker has mounts of its own: nobody else sees them, or keeps them by making a namespace of his own.
        process.unshare_mounts()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By layer, and those that have to be alone at the end, in one worker."""

    def order(item: pytest.Item) -> tuple[bool, int]:
        layer = item.path.parent.name
        return _is_alone(item), _LAYERS.index(layer) if layer in _LAYERS else 0

    items.sort(key=order)
    for item in filter(_is_alone, items):
        item.add_marker(pytest.mark.xdist_group("alone"))


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the limit of pytest-timeout
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Whoever has to be alone waits until no other test of this checkout runs; the others run beside each other."""
    lock = os.open(Path(__file__).parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH)
        return (yield)
    finally:
        os.close(lock)


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
    yield from _directory("coordlfs-source-", os.environ.get("COORDLFS_TEST_SOURCE", "/var/tmp"))


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
def pin(place: Path) -> Iterator[MakePin]:
    """Pins a directory; see `pins.Pinned`."""
    with ExitStack() as stack:
        count = 0

        def make(
            directory: Path,
            cache: str = "64M",
            *paths: Path,
            options: tuple[object, ...] = (),
            said: Callable[[str], None] = lambda text: None,
        ) -> Pinned:
            nonlocal count
            count += 1
            log = place / f"pin-log{count}"
            arguments = ["pin", directory, *paths, "--cache-size", cache, "--log-file", log, *options]
            done = coordlfs(*arguments, status=None)
            said(done.stdout + done.stderr)
            assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
            pinned = Pinned(directory, log)
            stack.callback(pinned.end)
            return pinned

        yield make


@pytest.fixture
def cgroup() -> Iterator[Callable[[int], Cgroup]]:
    """Makes a memory cgroup with a limit in bytes."""
    with ExitStack() as stack:

        def make(limit: int) -> Cgroup:
            group = stack.enter_context(cgroups.cgroup(memory=limit))
            stack.callback(group.kill)
            return group

        yield make
