"""A file system that shows a directory and fails on command.

`python -m coordlfs_tools.lab.faulty_fs DIRECTORY MNT FAULTS`. FAULTS is a file of JSON: for an operation and a name, as
in {"read f": {"errno": 5, "from": 4096, "delay": 0.5}}, the error to fail with (0: none), the first byte that fails,
seconds to wait before, and how many "times" it fails; one that "hangs" waits until that is taken back. For a name * is
all that are not named. It is read for every request, so that it may be changed at will, as `Faulty` does. The kernel is
told to remember no names and attributes; of a file that is opened no bytes either, if FAULTS has "forget". Files that
are there can be written to.
Tests and the soak stand it between coordlfs, of which it knows nothing, and a dataset or the image of a disk (`disks`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from coordlfs_tools.lab.mounts import is_mounted, unmount_lazily

_LIMIT = 20.0  # seconds to come up, and to end
_LOOK_EVERY = 0.05  # seconds, whether what hangs does so still
_PENDING = 1000  # requests that may wait for an answer; by default the kernel stops after 12


class Operations(pyfuse3.Operations):
    """One directory without subdirectories; inodes are those of its files, handles are descriptors of them."""

    def __init__(self, directory: Path, faults: Path) -> None:
        super().__init__()
        self.directory = directory
        self.faults = faults
        self.names: dict[int, str] = {}
        self.failed: dict[str, int] = {}
        self.opened: dict[int, int] = {}  # descriptor → inode

    def _fault(self, operation: str, name: str) -> dict[str, Any] | None:
        faults: dict[str, Any] = json.loads(self.faults.read_text())
        fault: dict[str, Any] | None = faults.get(f"{operation} {name}", faults.get(f"{operation} *"))
        return fault

    async def _fail(self, operation: str, name: str, end: int = 1 << 62) -> None:
        fault = self._fault(operation, name)
        if fault is None:
            return
        while fault.get("hangs") and self._fault(operation, name) == fault:
            await trio.sleep(_LOOK_EVERY)
        await trio.sleep(fault.get("delay", 0) if end > fault.get("from", 0) else 0)
        if fault.get("errno") and end > fault.get("from", 0):
            key = f"{operation} {name} {fault}"
            self.failed[key] = self.failed.get(key, 0) + 1
            if self.failed[key] > fault.get("times", 1 << 30):
                return
            raise pyfuse3.FUSEError(fault["errno"])

    def _named(self, name: str) -> pyfuse3.EntryAttributes:
        try:
            st = os.lstat(self.directory / name)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or 5) from e
        a = self._attributes(st)
        if not name:
            a.st_ino = pyfuse3.ROOT_INODE
        self.names[a.st_ino] = name
        return a

    @staticmethod
    def _attributes(st: os.stat_result) -> pyfuse3.EntryAttributes:
        a = pyfuse3.EntryAttributes()
        a.st_ino = st.st_ino
        a.st_mode, a.st_nlink, a.st_size, a.st_blocks = st.st_mode, st.st_nlink, st.st_size, st.st_blocks
        a.st_mtime_ns, a.st_ctime_ns, a.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        a.entry_timeout = a.attr_timeout = 0
        return a

    def _keep(self, a: pyfuse3.EntryAttributes) -> pyfuse3.EntryAttributes:
        """Have the kernel believe a name and its attributes for as long as the file of faults says as `keep`."""
        a.entry_timeout = a.attr_timeout = json.loads(self.faults.read_text()).get("keep", {}).get("seconds", 0)
        return a

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of the root or a file; of one that is open, even if its name leads elsewhere by now."""
        name = self.names.get(inode, "")
        await self._fail("getattr", name)
        for fd, of in self.opened.items():
            if of == inode:
                return self._attributes(os.fstat(fd))
        a = self._named(name)
        if a.st_ino != inode:
            raise pyfuse3.FUSEError(116)  # ESTALE
        return a

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """A file by its name."""
        await self._fail("lookup", os.fsdecode(name))
        return self._keep(self._named(os.fsdecode(name)))

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """The root."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The names in the root."""
        await self._fail("readdir", "")
        for position, name in enumerate(sorted(os.listdir(self.directory))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._named(name), position):
                return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """A file, as long as its name leads to it."""
        name = self.names[inode]
        await self._fail("open", name)
        try:
            fd = os.open(self.directory / name, flags & os.O_ACCMODE)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or 5) from e
        if os.fstat(fd).st_ino != inode:
            os.close(fd)
            raise pyfuse3.FUSEError(116)  # ESTALE
        self.opened[fd] = inode
        return pyfuse3.FileInfo(fh=fd, keep_cache="forget" not in json.loads(self.faults.read_text()))

    async def release(self, fh: int) -> None:
        """It is closed."""
        del self.opened[fh]
        os.close(fh)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of a file."""
        await self._fail("read", self.names[self.opened[fh]], off + size)
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Bytes for a file."""
        await self._fail("write", self.names[self.opened[fh]], off + len(buf))
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """What was written stays; nothing is done for that, as no machine is made to stop."""
        await self._fail("fsync", self.names[self.opened[fh]])

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """None, unless it fails."""
        await self._fail("getxattr", self.names.get(inode, ""))
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)


class Faulty:
    """The file system, served by a process of its own: `directory` shown beneath `place`. Raises TimeoutError."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.path = place / "faulty"
        self.path.mkdir()
        self._file = place / "faults"
        self.clear()
        self._command = [sys.executable, "-m", __name__, *map(str, (directory, self.path, self._file))]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command)
        try:
            deadline = time.monotonic() + _LIMIT
            while not is_mounted(self.path):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise TimeoutError(f"{self.path} was not mounted")
                time.sleep(0.01)
            _let_many_wait(self.path)
        except BaseException:
            self.detach()
            process.kill()
            process.wait()
            raise
        return process

    def set(self, what: str, **fault: float) -> None:
        """From now on this fails, and nothing else."""
        self._write({what: fault})

    def set_all(self, faults: dict[str, Any]) -> None:
        """From now on all these fail, and nothing else."""
        self._write(faults)

    def clear(self) -> None:
        """From now on nothing fails."""
        self._write({})

    def _write(self, faults: dict[str, Any]) -> None:
        beside = self._file.with_name("faults.new")
        beside.write_text(json.dumps(faults))
        os.rename(beside, self._file)

    def kill(self) -> None:
        """End the process, and nothing else: the file system answers ENOTCONN."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Unmount what is dead, and mount it again."""
        self.detach()
        self._process = self._start()

    def detach(self) -> None:
        """Unmount: in its place is an empty directory."""
        unmount_lazily(self.path)

    def end(self) -> None:
        """Unmount, and see that the process has ended. Raises TimeoutExpired if it has not by itself."""
        self.detach()
        try:
            self._process.wait(_LIMIT)
        finally:
            self._process.kill()
            self._process.wait()


def _let_many_wait(mounted: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="coordlfs-controls-") as controls:  # not every machine has them mounted
        subprocess.run(["mount", "-t", "fusectl", "fusectl", controls], check=True, timeout=_LIMIT)
        try:
            connection = os.minor(os.stat(mounted).st_dev)
            Path(controls, str(connection), "max_background").write_text(str(_PENDING))
        finally:
            subprocess.run(["umount", "-l", controls], check=True, timeout=_LIMIT)


@contextmanager
def served(directory: Path, place: Path) -> Iterator[Faulty]:
    """A `Faulty` for the length of a `with`."""
    faulty = Faulty(directory, place)
    try:
        yield faulty
    finally:
        faulty.end()


def main() -> None:
    """Serve until unmounted."""
    directory, mountpoint, faults = sys.argv[1:]
    pyfuse3.init(Operations(Path(directory), Path(faults)), mountpoint, {"fsname=faulty", "allow_other"})
    try:
        trio.run(pyfuse3.main, 1, _PENDING)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
