"""Which file systems give files new inode numbers though these do not change, so that a number says nothing.

FAT, and file systems that are asked over a network without numbers of their own (sshfs, rclone, object stores), make
numbers up as they go. There a file is known by its size and modification time alone. Those that do so are known by kind
or because one does it: a file shows another number each time, or shows another one though neither it nor any directory
above it was touched since the mount, so that nothing can have taken its place. What follows for versions is decided by
those who ask.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from coordlfs.kernel import mounts

log = logging.getLogger(__name__)

TEXT = "may give files new inode numbers: a file is known by its size and modification time alone"
_MADE_UP = frozenset(
    {
        *(b"vfat", b"msdos", b"exfat", b"fuse.sshfs", b"fuse.rclone", b"fuse.s3fs", b"fuse.gcsfuse", b"fuse.goofys"),
        *(b"fuse.geesefs", b"fuse.blobfuse", b"fuse.blobfuse2", b"fuse.curlftpfs", b"fuse.mount-s3", b"fuse.davfs2"),
    }
)
_PERHAPS = frozenset({b"overlay", b"9p", b"cifs", b"smb3", b"virtiofs", b"vboxsf", b"prl_fs", b"ntfs3", b"afs"})


def are_made_up(fstype: bytes | None) -> bool:
    """Whether file systems of this type are known to give new numbers."""
    return fstype in _MADE_UP


def _may_be_made_up(fstype: bytes | None) -> bool:
    return fstype is not None and (fstype in _PERHAPS or fstype.startswith(b"fuse"))


class Numbering:
    """What is known of the inode numbers of each file system. Thread-safe.

    `lstat` gives the attributes of a path beneath the source; `since` is when that was mounted, in ns.
    """

    def __init__(self, lstat: Callable[[bytes], os.stat_result], since: int) -> None:
        self._lstat = lstat
        self._since = since
        self._kinds: dict[int, bytes | None] = {}  # of file systems, by device
        self._made_up: set[int] = set()

    def _kind(self, device: int) -> bytes | None:
        if device not in self._kinds:
            kind = next((m.fstype for m in mounts.table() if m.device == device), None)
            self._kinds[device] = kind
            if are_made_up(kind):
                self._made_up.add(device)
        return self._kinds[device]

    def may_change(self, device: int) -> bool:
        """Whether a file of this file system may have got another number."""
        return _may_be_made_up(self._kind(device)) or device in self._made_up

    def says_nothing(self, device: int) -> bool:
        """Whether numbers of this file system are known to be made up."""
        self._kind(device)
        return device in self._made_up

    def is_made_up(self, path: bytes, st: os.stat_result) -> bool:
        """Whether the file at `path` only has another number, of which all else is as it was. May ask the source."""
        if self.says_nothing(st.st_dev):
            return True
        if not self.may_change(st.st_dev) or not (self._changes_at_once(path, st) or self._is_untouched(path, st)):
            return False
        if st.st_dev not in self._made_up:
            self._made_up.add(st.st_dev)
            kind = os.fsdecode(self._kind(st.st_dev) or b"")
            log.warning("the source (%s) %s, as %s shows", kind, TEXT, os.fsdecode(path) or "its root")
        return True

    def _changes_at_once(self, path: bytes, st: os.stat_result) -> bool:
        """Whether a file shows another number now and all else, its time of change included, as a moment ago."""
        try:
            now = self._lstat(path)
        except OSError:
            return False
        first, second = ((s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in (st, now))
        return first == second and st.st_ino != now.st_ino

    def _is_untouched(self, path: bytes, st: os.stat_result) -> bool:
        """Whether neither a file nor a directory above it can have been replaced since the mount."""
        try:
            while max(st.st_mtime_ns, st.st_ctime_ns) < self._since:
                if not path:
                    return True
                path = path.rpartition(b"/")[0]
                st = self._lstat(path)
        except OSError:
            pass
        return False
