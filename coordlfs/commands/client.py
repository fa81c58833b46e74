"""The client of the control socket: warm, drop, refresh and restart a mount.

It returns what was answered: what is shown of it is decided in `cli`.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from typing import Any, BinaryIO

from coordlfs.commands import mounted
from coordlfs.errors import UserError
from coordlfs.kernel import mounts, pages, process
from coordlfs.kernel import paths as kernel_paths
from coordlfs.processes import holders
from coordlfs.sources import address
from coordlfs.sources.contract import Source
from coordlfs.sources.directory import DirectorySource
from coordlfs.sources.layout import by_extent, walk

_BATCH = 64
_REPLACED_WITHIN, _SETTLED_WITHIN = 60.0, 30.0  # seconds
_CONNECTED_WITHIN = 60.0  # seconds
_LONGEST = 1 << 26  # bytes of a reply
_LOOK_EVERY = 1.0  # seconds between looks whether a server that has not answered is still there
_SORTED_AT_ONCE = 200_000  # files whose place on the disk is asked for before the first of them is read


class Connection:
    """A connection to a control socket (an abstract one). `place` is what is asked about, for messages.

    Raises OSError: EAGAIN if as many as may wait there for `within` seconds do.
    """

    def __init__(self, name: bytes, place: str, within: float = _CONNECTED_WITHIN) -> None:
        self.place = place
        self._sock = socket.socket(socket.AF_UNIX)
        seconds, microseconds = divmod(round(within * 1e6), 1_000_000)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, microseconds))
        try:
            self._sock.connect(b"\0" + name)
        except BaseException:
            self._sock.close()
            raise
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, self.user, _ = struct.unpack("3i", credentials)  # 0 in a container that cannot see it
        self._lines: BinaryIO = self._sock.makefile("rb")

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._sock.close()

    def _await(self) -> None:
        """Wait for a reply. Raises ConnectionError if the server ended without one.

        It may not be told by the connection: a thread that waits for the source keeps a dead server's sockets open.
        """
        while not process.is_readable(self._sock.fileno(), _LOOK_EVERY):
            if self.pid and process.exit_status(self.pid) is not None:
                raise ConnectionError

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One request and its reply. Raises UserError if there is none."""
        try:
            self._sock.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            self._await()
            line = self._lines.readline(_LONGEST)
        except ConnectionError:
            line = b""
        if not line:
            raise UserError(self._broken())
        with suppress(ValueError, RecursionError):
            reply = json.loads(line)
            if isinstance(reply, dict):
                return reply
        raise UserError(f"{self.place} answers what is no answer: is it coordlfs that listens there?")

    def _broken(self) -> str:
        return f"{self.place} broke off: it has ended, or is another user's; only root and who started it may do this"


class Client(Connection):
    """A connection to the server of a mount."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = os.path.realpath(mountpoint)
        self.root = os.fsdecode(mounted.whole(self.mountpoint).point)
        try:
            super().__init__(os.getxattr(self.root, "user.coordl.control"), self.mountpoint)
        except PermissionError:
            raise UserError(f"only root and who mounted {mountpoint} may do this") from None
        except OSError as e:
            raise UserError(f"{mountpoint} does not answer: {e.strerror}") from e

    def source(self) -> DirectorySource:
        """The mounted directory itself, even where it is mounted over.

        For a bucket it is the mount, which shows the same names, and asks the store for none.
        """
        if address.parse(mounted.stats(self.root)["source_path"]) is not None:
            return DirectorySource(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self._sock.sendall(b'{"verb": "source"}\n')
            self._await()
            _, fds, _, _ = socket.recv_fds(self._sock, 1, 1)
        except ConnectionError:
            fds = []
        if not fds:
            raise UserError(f"only root and who mounted {self.mountpoint} may do this")
        return DirectorySource(fds[0])

    def _broken(self) -> str:
        return (
            f"{self.mountpoint} broke off: it is mounted no longer, or another user's; only root and who mounted it"
            " may do this"
        )

    def relative(self, paths: list[str], *, follow: bool = False) -> list[bytes]:
        """See the function: of the mount's root."""
        return relative(self.root, paths, follow=follow)


def relative(root: str, paths: list[str], *, follow: bool = False) -> list[bytes]:
    """Paths the user named, relative to `root`; of a symbolic link to a file, `follow` takes that.

    Raises UserError for one outside.
    """
    found = []
    for path in paths:
        if not path:
            raise UserError(f"an empty path names nothing: name files or directories in {root}", 2)
        real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
        if os.path.isdir(real) or (follow and os.path.exists(real)):
            real = os.path.realpath(real)
        if real == root:
            found.append(b"")
        elif real.startswith(root.rstrip("/") + "/"):
            _check_exists(path, real)
            found.append(os.fsencode(os.path.relpath(real, root)))
        else:
            raise UserError(f"{path} does not lie in {root}", 2)
    return found


def _check_exists(path: str, real: str) -> None:
    try:
        os.lstat(real)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be found: {e.strerror}") from None


def _files(source: Source, start: bytes, linked: dict[tuple[int, int], bytes]) -> dict[bytes, int]:
    """What is to be read of the files at and below a path: bytes, by one path of each.

    `linked` keeps that path of files with several names, by device and inode.
    """
    sizes: dict[bytes, int] = {}
    for path, st in walk(source, start):
        if stat.S_ISREG(st.st_mode) and st.st_size:
            one = path if st.st_nlink == 1 else linked.setdefault((st.st_dev, st.st_ino), path)
            sizes[one] = -(-st.st_size // pages.PAGE) * pages.PAGE
    return sizes


def warm(mountpoint: str, paths: list[str]) -> dict[str, Any]:
    """Fill the cache with the files named (or all), in the order they lie on the disk; figures of what was done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    client = Client(mountpoint)
    try:
        figures = mounted.stats(client.root)
        if not figures["capacity_bytes"] and not figures.get("disk"):
            raise UserError(f"{mountpoint} has no cache: mount it with a --cache-size")
        source = client.source()
        files: dict[bytes, int] = {}
        linked: dict[tuple[int, int], bytes] = {}
        for path, start in zip(paths, client.relative(paths, follow=True), strict=True):
            if not (there := _files(source, start, linked)):
                raise UserError(
                    f"there is no file with bytes to cache at {path}: name files or directories on the mount"
                )
            files |= there
        if not paths:
            files = _files(source, b"", linked)
        room = figures["memory"]["limit_bytes"] - figures["pinned_bytes"]
        columns = (
            TextColumn("warming"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        total: dict[str, Any] = {
            "files": 0,
            "items": 0,
            "pinned": 0,
            "bytes": 0,
            "untried": len(files),
            "is_full": room < pages.PAGE,
        }
        total |= {"on_disk": 0, "on_disk_bytes": 0, "disk_stopped": None}
        if disk := figures.get("disk"):
            total["is_full"] = False
        with Progress(*columns) as progress:
            room_in_all = figures["capacity_bytes"] + (disk["size_bytes"] if disk else 0)
            task = progress.add_task("warm", total=min(sum(files.values()), room_in_all))
            names = list(files)
            for first in range(0, len(names), _SORTED_AT_ONCE):
                ordered = by_extent(source, names[first : first + _SORTED_AT_ONCE])
                for at in range(0, len(ordered), _BATCH):
                    batch = ordered[at : at + _BATCH]
                    reply = client.ask("admit", paths=[kernel_paths.to_text(p) for p in batch])
                    total["files"] += len(batch)
                    total["untried"] -= len(batch)
                    total["items"] += reply["items"]
                    total["pinned"] += reply["pinned"]
                    total["bytes"] += reply["pinned_pages"] * pages.PAGE
                    for key in ("on_disk", "on_disk_bytes"):
                        total[key] += reply.get(key, 0)  # a server of version 0.2 does not say
                    total["disk_stopped"] = reply.get("disk_stopped")
                    cached = reply["pinned"] + reply.get("on_disk", 0)
                    progress.update(task, advance=reply["pinned_pages"] * pages.PAGE + reply.get("on_disk_bytes", 0))
                    room = reply["free_pages"] * pages.PAGE
                    if cached < reply["items"] and room < max(files[p] for p in batch):
                        total["is_full"] = True
                    if room < pages.PAGE and not reply["pinned"] and reply.get("is_disk_full", True):
                        return total
        return total
    finally:
        client.close()


def drop(mountpoint: str, paths: list[str]) -> dict[str, int]:
    """Unpin the files named (or all); what was freed."""
    client = Client(mountpoint)
    try:
        if not paths:
            return client.ask("drop")
        source = client.source()
        total = {"dropped": 0, "freed_pages": 0, "freed_disk_bytes": 0}
        names: list[str] = []
        for path, start in zip(paths, client.relative(paths, follow=True), strict=True):
            there = [kernel_paths.to_text(found) for found, st in walk(source, start) if stat.S_ISREG(st.st_mode)]
            if not there:
                raise UserError(f"there is no file at {path}: name files or directories on the mount")
            names += there
        for at in range(0, len(names), _BATCH):
            reply = client.ask("drop", paths=names[at : at + _BATCH])
            for key in total:
                total[key] += reply.get(key, 0)
        return total
    finally:
        client.close()


def refresh(mountpoint: str, paths: list[str]) -> dict[str, int]:
    """Have the files and directories named (or all) compared with the source; what was done."""
    client = Client(mountpoint)
    try:
        return client.ask("refresh", paths=[kernel_paths.to_text(p) for p in client.relative(paths) or [b""]])
    finally:
        client.close()


def restart(mountpoint: str) -> dict[str, int]:
    """Replace server, keepers and peer server, one after the other, by the version that is installed; what was done.

    Raises UserError if a new process does not come up in time.
    """
    mount, before = mounted.whole(mountpoint), mounted.stats(mountpoint)
    server, keepers = before["processes"]["server"], before["processes"]["keepers"]
    peer_servers = [pid] if (pid := before["processes"]["peer_server"]) is not None else []
    for pid in (server, *keepers, *peer_servers):
        _replace(mountpoint, pid, before["pinned_items"])
    _tell_what_fails(mountpoint, mount)
    pinned = mounted.stats(mountpoint)["pinned_items"]
    return {"keepers": len(keepers), "peer_servers": len(peer_servers), "pinned_items": pinned}


def _tell_what_fails(mountpoint: str, before: mounts.Mount) -> None:
    """Name what shows the mount as it was before, if it was mounted again (before Linux 6.9)."""
    if mounted.find(mountpoint).device == before.device:
        return
    old = [os.fsdecode(place.point) for place in holders.places(before)]
    if found := holders.of_namespaces(before):
        old.append(f"the mount namespace of process {holders.text(found)}")
    if old:
        where = kernel_paths.shown(", ".join(old))
        print(f"coordlfs: mounted again; this still has the old mount, and fails: {where}", file=sys.stderr)


def _replace(mountpoint: str, pid: int, pinned: int) -> None:
    end = time.monotonic() + _REPLACED_WITHIN
    settled = end  # until all that was pinned is pinned again; what the job or the memory made of it is not our concern
    asked = None  # the server: one that dies may take the request with it
    while (now := time.monotonic()) < end:
        try:
            figures = mounted.stats(mountpoint)
        except UserError:  # before Linux 6.9 it is mounted again, and is not there for a moment
            time.sleep(0.05)
            continue
        processes = figures["processes"]
        if pid not in (processes["server"], *processes["keepers"], processes["peer_server"]):
            settled = min(settled, now + _SETTLED_WITHIN)
            if (figures["pinned_items"] >= pinned and not figures["pending_items"]) or now > settled:
                return
        elif asked != processes["server"]:
            asked = processes["server"]
            _ask_to_replace(mountpoint, pid)
        time.sleep(0.05)
    raise UserError(f"{mountpoint} has not replaced process {pid} within {_REPLACED_WITHIN:.0f} s: see its log")


def _ask_to_replace(mountpoint: str, pid: int) -> None:
    client = Client(mountpoint)
    try:
        with suppress(UserError):  # a server that is replaced may be gone before it can answer
            client.ask("replace", pid=pid)
    finally:
        client.close()
