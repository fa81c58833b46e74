"""A file that changes under its readers, against a model: a list of its versions.

Whatever is done in whatever order: all that one `open` gives is of one version, or an error; and once `coordlfs
refresh` has answered, another `open` gives the newest.
"""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import random
import signal
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from mounts import MIB, PAGE, MakeMount, Mount, eventually

from coordlfs.commands import cli

_SIZES = st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 20_000, 128 * 1024, 300_000, MIB + 1])
_STALE = (errno.ESTALE, errno.ENOENT)
_NUMBERS = itertools.count()


def _or_stale(action: Callable[..., bytes | None], *arguments: int) -> bytes | None:
    """What `action` returns; None if it is told that the file changed."""
    try:
        return action(*arguments)
    except OSError as e:
        if e.errno not in _STALE:
            raise
        return None


def _read(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


def _whole(fd: int) -> bytes:
    got = b""
    while part := os.read(fd, 100_000):
        got += part
    return got


def _mapped(fd: int, offset: int, size: int) -> bytes | None:
    """Bytes through a mapping, by a process of its own; None if an error kills it."""
    end = min(os.fstat(fd).st_size, offset + size)
    if end <= offset:
        return b""
    with tempfile.TemporaryFile() as to:
        child = os.fork()
        if not child:
            try:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                with mmap.mmap(fd, end, prot=mmap.PROT_READ) as mapping:
                    os.pwrite(to.fileno(), mapping[offset:end], 0)
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGBUS)
        return None if status else to.read()


def _direct(fd: int, offset: int, size: int) -> bytes:
    """Bytes around the page cache."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as into:
            n = os.preadv(again, [into], offset)
            return into[:n]
    finally:
        os.close(again)


class _Open:
    """An open file, and which versions it may be."""

    def __init__(self, fd: int, is_newest: bool) -> None:
        self.fd = fd
        self.is_newest = is_newest  # and is to be read without an error, as long as nothing changes
        self.may_be: list[bytes] | None = None  # any, until something was read


class Changes(RuleBasedStateMachine):
    """One file of one mount."""

    mounted: Mount

    def __init__(self) -> None:
        super().__init__()
        self.name = f"f{next(_NUMBERS)}"
        self.source = self.mounted.source / self.name
        self.path = self.mounted.path / self.name
        self.random = random.Random(self.name)
        self.versions = [self.random.randbytes(50_000)]
        self.source.write_bytes(self.versions[0])
        self.files: list[_Open] = []
        self.is_noticed = False

    def teardown(self) -> None:
        for file in self.files:
            os.close(file.fd)
        self.source.unlink(missing_ok=True)

    # -- what happens to the source -------------------------------------------------------------------------------

    @rule(
        how=st.sampled_from(["write over", "truncate", "append", "replace", "recreate", "write anew"]),
        size=_SIZES,
    )
    def change(self, how: str, size: int) -> None:
        old = self.versions[-1]
        data = self.random.randbytes(size)
        if how == "write over":
            data = self.random.randbytes(len(old))
            with open(self.source, "r+b", buffering=0) as f:
                f.write(data)
        elif how == "truncate":
            data = old[: max(1, len(old) // 2)]
            os.truncate(self.source, len(data))
        elif how == "append":
            data = old + data
            with open(self.source, "ab", buffering=0) as f:
                f.write(data[len(old) :])
        elif how == "replace":
            beside = self.source.with_name(self.name + ".new")
            beside.write_bytes(data)
            os.rename(beside, self.source)
        elif how == "recreate":
            self.source.unlink()
            self.source.write_bytes(data)
        else:
            self.source.write_bytes(data)
        # Two changes within a tick of the clock, to one size, are one to whoever looks at times.
        os.utime(self.source, ns=(0, 1_600_000_000_000_000_000 + next(_NUMBERS)))
        self.versions.append(data)
        self.is_noticed = False
        for file in self.files:
            file.is_newest = False

    # -- what is done to the mount --------------------------------------------------------------------------------

    @rule()
    def refresh(self) -> None:
        with redirect_stdout(io.StringIO()):
            assert cli.main(["refresh", str(self.mounted.path)]) == 0
        self.is_noticed = True

    @rule(direct=st.booleans())
    def forget(self, direct: bool) -> None:
        """The kernel lets go of what it may."""
        for file in self.files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @rule()
    def stat(self) -> None:
        assert os.stat(self.path).st_size in {len(version) for version in self.versions}

    @precondition(lambda self: len(self.versions) % 5 == 4)
    @rule()
    def kill(self) -> None:
        before = self.mounted.stats()["processes"]["server"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: self.mounted.stats()["processes"]["server"] != before)

    # -- readers --------------------------------------------------------------------------------------------------

    @rule()
    def open(self) -> None:
        self.files.append(_Open(os.open(self.path, os.O_RDONLY), self.is_noticed))

    @precondition(lambda self: self.files)
    @rule(
        data=st.data(),
        way=st.sampled_from(["read", "map", "direct"]),
        at=st.sampled_from([0, 0, 0, PAGE, 40_000, 130_000]),
        size=st.sampled_from([1, PAGE, 50_000, 2 * MIB]),
    )
    def read(self, data: st.DataObject, way: str, at: int, size: int) -> None:
        file = data.draw(st.sampled_from(self.files))
        got = _or_stale({"read": _read, "map": _mapped, "direct": _direct}[way], file.fd, at, size)
        if got is None:
            assert not file.is_newest, "an error, though nothing has changed"
            return
        known = self.versions if file.may_be is None else file.may_be
        fits = [v for v in known if v[at : at + size].startswith(got) and (got or at >= len(v))]
        assert fits, f"{len(got)} bytes at {at} are of no version, or of another one than before"
        if got:
            file.may_be = fits
        if file.is_newest:
            assert got == self.versions[-1][at : at + size], "older than what was noticed"

    @precondition(lambda self: self.files)
    @rule()
    def close(self) -> None:
        os.close(self.files.pop(0).fd)

    @rule()
    def look(self) -> None:
        """An ordinary open and read of everything."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            got = _or_stale(_whole, fd)
        finally:
            os.close(fd)
        assert got is None or got in self.versions
        assert not self.is_noticed or got == self.versions[-1], "older than what was noticed"


@pytest.fixture(params=["source", "in_memory"])
def changing(request: pytest.FixtureRequest, mount: MakeMount) -> Mount:
    where: Path = request.getfixturevalue(request.param)
    mounted = mount(where, "2M", "--immutable")
    mounted.expect_errors = True  # its server is killed
    return mounted


@pytest.mark.timeout(300)
def test_an_open_file_is_one_version(changing: Mount) -> None:
    class OfThisMount(Changes):
        mounted = changing

    run_state_machine_as_test(
        OfThisMount,
        settings=settings(
            max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
