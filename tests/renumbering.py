"""A file system that shows one directory and gives each name a new inode number whenever it is asked for: `DIR MNT`.

As sshfs, rclone and FAT do, once the kernel has forgotten a name; here it remembers none.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from mounts import eventually, is_mounted, unmount_lazily


class _Operations(pyfuse3.Operations):
    def __init__(self, directory: bytes) -> None:
        super().__init__()
        self._directory = directory
        self._paths = {pyfuse3.ROOT_INODE: directory}
        self._numbers = itertools.count(10)

    def _named(self, name: bytes) -> pyfuse3.EntryAttributes:
        path, number = os.path.join(self._directory, name), next(self._numbers)
        a = self._attributes(path, number)
        self._paths[number] = path
        return a

    @staticmethod
    def _attributes(path: bytes, number: int) -> pyfuse3.EntryAttributes:
        try:
            st = os.lstat(path)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or 5) from e
        a = pyfuse3.EntryAttributes()
        a.st_ino, a.st_mode, a.st_nlink, a.st_size, a.st_blocks = (
            number,
            st.st_mode,
            st.st_nlink,
            st.st_size,
            st.st_blocks,
        )
        a.st_mtime_ns, a.st_ctime_ns, a.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        a.entry_timeout = a.attr_timeout = 0
        return a

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[inode], inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._named(name)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, name in enumerate(sorted(os.listdir(self._directory))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._named(name), position):
                return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDONLY))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        os.close(fh)


@contextmanager
def renumbering(directory: Path, place: Path) -> Iterator[Path]:
    """Where `directory` is shown so, beneath `place`."""
    path = place / "renumbering"
    path.mkdir()
    process = subprocess.Popen([sys.executable, __file__, str(directory), str(path)])
    try:
        eventually(lambda: is_mounted(path) and os.listdir(path))
        yield path
    finally:
        unmount_lazily(path)
        process.kill()
        process.wait()


def main() -> None:
    """Serve until unmounted."""
    directory, mountpoint = map(os.fsencode, sys.argv[1:])
    pyfuse3.init(_Operations(directory), os.fsdecode(mountpoint), {"fsname=renumbering", "allow_other"})
    try:
        trio.run(pyfuse3.main, 1, 100)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
