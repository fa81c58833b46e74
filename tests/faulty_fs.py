"""A file system for the tests that shows a directory and fails on demand: `python faulty_fs.py DIRECTORY MNT FAULTS`.

FAULTS is a file of JSON: for an operation and a name, as in {"read f": {"errno": 5, "from": 4096, "delay": 0.5}}, the
error to fail with (0: none), the first byte that fails, seconds to wait before, and how many "times" it fails.
It is read for every request, so
that a test changes it at will. The kernel is told to remember nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio


class Faulty(pyfuse3.Operations):
    """One directory without subdirectories; inodes are those of its files."""

    def __init__(self, directory: Path, faults: Path) -> None:
        super().__init__()
        self.directory = directory
        self.faults = faults
        self.names: dict[int, str] = {}
        self.failed: dict[str, int] = {}

    async def _fail(self, operation: str, name: str, end: int = 1 << 62) -> None:
        fault: dict[str, Any] | None = json.loads(self.faults.read_text()).get(f"{operation} {name}")
        if fault is None:
            return
        await trio.sleep(fault.get("delay", 0))
        if fault.get("errno") and end > fault.get("from", 0):
            key = f"{operation} {name} {fault}"
            self.failed[key] = self.failed.get(key, 0) + 1
            if self.failed[key] > fault.get("times", 1 << 30):
                return
            raise pyfuse3.FUSEError(fault["errno"])

    def _attributes(self, name: str) -> pyfuse3.EntryAttributes:
        try:
            st = os.lstat(self.directory / name)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or 5) from e
        a = pyfuse3.EntryAttributes()
        a.st_ino = st.st_ino if name else pyfuse3.ROOT_INODE
        a.st_mode, a.st_nlink, a.st_size, a.st_blocks = st.st_mode, st.st_nlink, st.st_size, st.st_blocks
        a.st_mtime_ns, a.st_ctime_ns, a.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        a.entry_timeout = a.attr_timeout = 0
        self.names[a.st_ino] = name
        return a

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of the root or a file."""
        name = self.names.get(inode, "")
        await self._fail("getattr", name)
        return self._attributes(name)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """A file by its name."""
        await self._fail("lookup", os.fsdecode(name))
        return self._attributes(os.fsdecode(name))

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """The root."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The names in the root."""
        await self._fail("readdir", "")
        for position, name in enumerate(sorted(os.listdir(self.directory))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._attributes(name), position):
                return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """A file; handles are inodes."""
        await self._fail("open", self.names[inode])
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of a file."""
        await self._fail("read", self.names[fh], off + size)
        with open(self.directory / self.names[fh], "rb") as f:
            return os.pread(f.fileno(), size, off)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """None, unless it fails."""
        await self._fail("getxattr", self.names.get(inode, ""))
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)


def main() -> None:
    """Serve until unmounted."""
    directory, mountpoint, faults = sys.argv[1:]
    pyfuse3.init(Faulty(Path(directory), Path(faults)), mountpoint, {"fsname=faulty", "allow_other"})
    try:
        trio.run(pyfuse3.main, 1, 1000)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
