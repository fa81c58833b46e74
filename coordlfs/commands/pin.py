"""`coordlfs pin` and `unpin`: keep pages of a directory's own files in memory. Everything is checked first.

How that is done is the business of the supervisor, which it starts.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing, suppress
from typing import Any

from coordlfs import sizes
from coordlfs.cache import residence
from coordlfs.commands import pinned
from coordlfs.commands.client import relative
from coordlfs.commands.mount import Options
from coordlfs.commands.mounted import FSTYPE
from coordlfs.commands.starting import (
    await_ready,
    check_compiled,
    check_limits,
    check_log,
    check_source,
    ended_by_signals,
    start,
)
from coordlfs.errors import UserError
from coordlfs.kernel import limits, mounts, pages, paths, process
from coordlfs.kernel.memory import memory
from coordlfs.kernel.paths import shown
from coordlfs.pinning.dataset import IN_MEMORY, MADE_UP
from coordlfs.processes import exporter
from coordlfs.sources import layout
from coordlfs.sources.directory import DirectorySource, lies_elsewhere

_SUPERVISOR = "coordlfs.processes.pin_supervisor"
_END_TIMEOUT, _LOOK_AGAIN = 30.0, 0.02  # seconds
_ASKED = 6  # times, within that timeout
_PROBED = 1000  # names that are looked at for a file to try


def pin(
    directory: str, named: list[str], options: Options, *, foreground: bool = False, bound: bool = False
) -> subprocess.Popen[bytes]:
    """Pin a directory, or the files and directories `named` in it; returns when the pinner works. The supervisor.

    `foreground` logs to standard error; it and `bound` have it end with this process. Raises UserError.
    """
    if not directory:
        raise UserError("an empty path names no directory", 2)
    directory = os.path.realpath(directory)
    wanted = relative(directory, named, follow=True)
    capacity, how = sizes.cache_size(options.cache_size, memory())
    check_compiled()
    check_limits()
    check_log(options.log_file)
    root = check_source(directory)
    sockets: list[socket.socket] = []
    try:
        kind = mounts.fstype(root)
        _check_kind(directory, root, kind)
        lockable = process.lockable()
        most_of_all, most = residence.pinnable(capacity, lockable)
        if capacity and most_of_all < pages.PAGE:
            raise UserError(f"{directory} cannot be pinned, as no memory may be locked: {residence.REMEDY}")
        sockets.append(pinned.listen(directory))
        if options.metrics is not None:
            sockets.append(exporter.listen(options.metrics))
        config = {
            "source": directory,
            "mountpoint": directory,
            "paths": [paths.to_text(path) for path in wanted],
            "capacity": most_of_all,
            "most": most,
            "wanted": capacity,
            "residence": residence.Residence.PAGE_CACHE,
            "lockable": lockable,
            "log": os.path.abspath(options.log_file) if options.log_file else "stderr" if foreground else None,
            "is_remote": lies_elsewhere(root, os.fsencode(directory)),
            "is_busy": False,
            "fstype": None if kind is None else os.fsdecode(kind),
            "revalidate": options.revalidate,
            "root": root,
            "control": sockets[0].fileno(),
            "metrics": sockets[1].fileno() if options.metrics is not None else None,
            "bound_to": os.getpid() if foreground or bound else None,
            "peers": None,
        }
        with ended_by_signals():
            supervisor = None
            try:
                fds = [root, *(sock.fileno() for sock in sockets)]
                supervisor, report = start(_SUPERVISOR, config, fds, foreground=foreground)
                await_ready(report, lambda failure: _explain(directory, failure))
            except BaseException:
                if supervisor is not None:
                    end(supervisor)
                raise
        said = sys.stderr if bound else sys.stdout  # the output of `run` is the command's
        of_it = f"{len(wanted)} of its files and directories" if wanted else "it"
        print(
            f"{shown(directory)}: up to {sizes.text(most_of_all)} of {of_it} stay in memory ({how})",
            file=said,
            flush=True,
        )
        if left_out := residence.left_out(capacity, lockable):
            print(f"coordlfs: {left_out}", file=sys.stderr)
        if options.metrics is not None:
            print(f"metrics: {exporter.url(sockets[1])}", file=said, flush=True)
        return supervisor
    finally:
        os.close(root)
        for sock in sockets:
            sock.close()


def _check_kind(directory: str, root: int, kind: bytes | None) -> None:
    """Raise UserError for a directory whose file system pinning cannot work on, or makes no sense."""
    if kind == FSTYPE:
        raise UserError(
            f"{directory} is a mount of coordlfs, which keeps in memory what it caches: give it a larger --cache-size"
        )
    if kind in MADE_UP:
        raise UserError(f"{directory} holds no data: the kernel makes its files up ({os.fsdecode(kind)})")
    if kind in IN_MEMORY:
        raise UserError(f"{directory} is in memory already (it is {os.fsdecode(kind)}): there is nothing to pin")
    if kind is not None and kind.startswith(b"fuse") and not _keeps_pages(root):
        raise UserError(
            f"{directory} ({os.fsdecode(kind)}) drops what is cached of a file each time that it is opened, pinned or"
            " not: mount it with an option like kernel_cache, or use `coordlfs mount`"
        )


def _keeps_pages(root: int) -> bool:
    """Whether pages of a file are there still once it has been opened again; if nothing can be tried, so it is said."""
    source = DirectorySource(root)
    with suppress(OSError):
        for number, (path, st) in enumerate(layout.walk(source, b"")):
            if stat.S_ISREG(st.st_mode) and st.st_size:
                return _keeps_page(source, path)
            if number > _PROBED:
                break
    return True


def _keeps_page(source: DirectorySource, path: bytes) -> bool:
    fd = source.open(path)
    try:
        address = pages.map_file(fd, 0, pages.PAGE)
    except OSError:
        return False
    finally:
        os.close(fd)
    try:
        pages.populate(address, pages.PAGE)
        os.close(source.open(path))
        return pages.resident_runs(address, pages.PAGE) == [(0, 1)]
    finally:
        pages.unmap(address, pages.PAGE)


def _explain(directory: str, failure: dict[str, Any]) -> UserError:
    text = failure.get("error", "the supervisor died")
    return UserError(f"{directory} could not be pinned: {text}{limits.hint()}")


def end(supervisor: subprocess.Popen[bytes]) -> None:
    """Have a supervisor end that this process has started, with all that it pins, and wait for it."""
    supervisor.terminate()
    with suppress(subprocess.TimeoutExpired):
        supervisor.wait(_END_TIMEOUT)


def unpin(directory: str) -> None:
    """Let go of what is pinned, and return when every process of it has ended. Raises UserError."""
    processes = _processes(directory)
    pids = [processes["server"], *processes["keepers"], processes["supervisor"]]
    if _ask_to_end(directory, pids):
        _wait_until_found_no_more(directory)
        return
    still = ", ".join(str(pid) for pid in pids if process.exit_status(pid) is None)
    raise UserError(f"{directory} is let go of, but its processes {still} still run: see its log")


def _processes(directory: str) -> dict[str, Any]:
    """Which processes have a directory pinned. Raises UserError."""
    try:
        figures = pinned.stats(directory)
    except UserError:  # a pinner that dies may take the question along, and the next one answers
        figures = pinned.stats(directory)
    processes: dict[str, Any] = figures["processes"]
    return processes


def _ask_to_end(directory: str, pids: list[int]) -> bool:
    """Ask until all of these processes have ended; whether they did. One that dies may take the question along."""
    for _ in range(_ASKED):
        if (pin := pinned.find(directory)) is not None:
            with closing(pin), suppress(UserError):
                pin.ask("end")
        if process.wait_gone(pids, _END_TIMEOUT / _ASKED):
            return True
    return False


def _wait_until_found_no_more(directory: str) -> None:
    deadline = time.monotonic() + _END_TIMEOUT
    while (left := pinned.find(directory)) is not None and time.monotonic() < deadline:
        left.close()
        time.sleep(_LOOK_AGAIN)
