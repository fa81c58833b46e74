"""`coordlfs mount`: everything is checked first, and nothing is left half done.

How a mount is served is the business of the supervisor, which it starts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from coordlfs import sizes
from coordlfs.cache import residence
from coordlfs.cache.residence import Residence
from coordlfs.commands.choice import FITS, fits_pin
from coordlfs.commands.disk_cache import claimed
from coordlfs.commands.mounted import FSTYPE, clear_dead
from coordlfs.commands.starting import (
    await_ready,
    check_compiled,
    check_limits,
    check_log,
    check_source,
    ended_by_signals,
    start,
)
from coordlfs.disk import places
from coordlfs.errors import UserError
from coordlfs.kernel import fusermount, limits, mounts, process
from coordlfs.kernel.memory import Memory, memory
from coordlfs.kernel.paths import shown
from coordlfs.processes import attachment, exporter
from coordlfs.sources import address, numbering
from coordlfs.sources.directory import lies_elsewhere

if TYPE_CHECKING:
    from coordlfs.peers.settings import Cluster

_SUPERVISOR = "coordlfs.processes.supervisor"
_OTHERS_MOUNT, _LOOK_AGAIN = 5.0, 0.02


@dataclass(frozen=True, slots=True)
class Options:
    """What `mount` and `run` take."""

    cache_size: str = "auto"
    log_file: str | None = None
    revalidate: float | None = 600.0  # seconds in which a change is noticed; None: the source never changes
    metrics: str | None = None  # where Prometheus may ask: HOST:PORT
    cluster: Cluster | None = None  # to share caches with
    noexec: bool = False  # no program on the mount may be run
    disk_cache: str | None = None  # a directory for the second tier
    disk_size: str = "auto"
    source_options: tuple[str, ...] = ()  # KEY=VALUE, for a bucket; see `sources.address`


def _about_directory(source: str, root: int | None) -> dict[str, Any]:
    """What the processes of a mount are told of a directory."""
    assert root is not None
    return {
        "root": root,
        "identity": places.identity(os.fsencode(source), root),
        # What is mounted beneath may have ACLs; without them it costs a request that says so.
        "acl": _supports_acl(root) or any(mounts.beneath(os.fsencode(source))),
        "is_remote": lies_elsewhere(root, os.fsencode(source)),
        "fstype": None if (fstype := mounts.fstype(root)) is None else os.fsdecode(fstype),
    }


def _about_bucket(bucket: address.Address, options: address.Options) -> dict[str, Any]:
    """What the processes of a mount are told of a bucket, once it has been listed. Raises UserError."""
    from coordlfs.commands import buckets  # here, since obstore is loaded for a bucket only

    buckets.check(bucket, options)
    about = {"root": None, "acl": False, "is_remote": True, "fstype": None, "bucket": (bucket, options)}
    return about | {"identity": places.identity_of_bucket(str(bucket), options.endpoint)}


def _check_places(source: str, mountpoint: str) -> None:
    if source == mountpoint:
        return
    if source.startswith(mountpoint.rstrip("/") + "/"):
        raise UserError(f"{source} lies inside {mountpoint}, which would hide it: mount beside it, or in place")
    if mountpoint.startswith(source.rstrip("/") + "/"):
        raise UserError(f"{mountpoint} lies inside {source}, which would contain itself: mount beside it, or in place")


def _check_mountpoint(source: str, mountpoint: str) -> bool:
    """Make the mountpoint if it is missing; whether it was."""
    clear_dead(mountpoint)
    _check_unmounted(mountpoint)
    try:
        st = os.stat(mountpoint)
    except FileNotFoundError:
        try:
            os.mkdir(mountpoint)
        except FileNotFoundError:
            raise UserError(f"{os.path.dirname(mountpoint)} does not exist: make it, then mount in it") from None
        except OSError as e:
            raise UserError(f"{mountpoint} cannot be made: {e.strerror}") from None
        return True
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise UserError(f"{mountpoint} is a dead mount: `umount -l {mountpoint}` first") from None
        raise UserError(f"{mountpoint} cannot be used: {e.strerror}") from None
    if not stat.S_ISDIR(st.st_mode):
        raise UserError(f"{mountpoint} is not a directory: mount on a directory")
    if source != mountpoint and os.listdir(mountpoint):
        print(f"coordlfs: {shown(mountpoint)} is not empty; what it holds is hidden while mounted", file=sys.stderr)
    return False


def _check_unmounted(mountpoint: str) -> None:
    for m in mounts.table():
        if m.fstype == FSTYPE and m.point == os.fsencode(mountpoint):
            raise UserError(f"{mountpoint} is a coordlfs mount already: `coordlfs umount {mountpoint}` first")


@contextmanager
def _alone(mountpoint: str) -> Iterator[None]:
    """Have others wait who are about to mount on the same directory.

    Where its file system has no locks they do not, nor for long where somebody locks it for reasons of their own.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            _lock(fd, time.monotonic() + _OTHERS_MOUNT)
        yield


def _lock(fd: int, until: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                return
        time.sleep(_LOOK_AGAIN)


def _check_may_mount() -> None:
    """That FUSE is there, and that this process, or fusermount3 in its name, may mount at all."""
    _check_fuse()  # fusermount3 opens the device as the user as well
    if not attachment.is_privileged() and (problem := fusermount.problem()):
        what, remedy = problem
        raise UserError(f"mounting is not permitted without root: {what}: {remedy}")


def _check_may_mount_on(mountpoint: str) -> None:
    if not attachment.is_privileged() and (reason := fusermount.forbidden(mountpoint)):
        raise UserError(f"{mountpoint} {reason}: without root, mount on a directory of your own")


def _check_fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError:
        raise UserError(
            "there is no /dev/fuse: load FUSE (`modprobe fuse`), or give the container the device"
        ) from None
    except PermissionError:
        raise UserError(
            "/dev/fuse may not be opened: `chmod 666 /dev/fuse`, run as root, or give the container the device"
        ) from None
    except OSError as e:
        if e.errno in (errno.ENODEV, errno.ENXIO):
            raise UserError("this kernel has no FUSE: load it (`modprobe fuse`) or use one that has") from None
        raise UserError(f"/dev/fuse cannot be opened: {e.strerror}") from None


def _explain(source: str, mountpoint: str, failure: dict[str, Any]) -> UserError:
    code, text = failure.get("errno"), failure.get("error", "the supervisor died")
    if code in (errno.EPERM, errno.EACCES) and not process.in_initial_user_namespace():
        return UserError(
            f"mounting on {mountpoint} is not permitted in a user namespace: allow it (on Ubuntu `sysctl"
            " kernel.apparmor_restrict_unprivileged_userns=0`), run as root, or use `coordlfs mount`"
        )
    if code == errno.EACCES and not attachment.is_privileged():
        return UserError(f"mounting on {mountpoint} is not permitted: {fusermount.explain_refusal(mountpoint)}")
    if code in (errno.EPERM, errno.EACCES):
        return UserError(f"mounting on {mountpoint} is not permitted ({text}): run as root (CAP_SYS_ADMIN is needed)")
    if code == errno.ENODEV:
        return UserError("this kernel has no FUSE: load it (`modprobe fuse`) or use one that has")
    return UserError(f"{source} could not be mounted on {mountpoint}: {text}{limits.hint()}")


def _supports_acl(source_fd: int) -> bool:
    try:
        os.getxattr(source_fd, "system.posix_acl_access")
    except OSError as e:
        return e.errno == errno.ENODATA
    return True


def mount(
    source: str, mountpoint: str, options: Options, *, foreground: bool = False, bound: bool = False
) -> subprocess.Popen[bytes]:
    """Mount, and return when the mount serves; the supervisor. Raises UserError.

    `foreground` logs to standard error; it and `bound` have the mount end with this process.
    """
    if not source or not mountpoint:
        raise UserError("an empty path names no directory", 2)
    bucket, how_to_ask = address.parse(source), address.options(options.source_options)
    source, mountpoint = address.canonical(source), os.path.realpath(mountpoint)
    have = memory()
    capacity, how = sizes.cache_size(options.cache_size, have)
    lockable = process.lockable()
    kind = residence.choose(capacity, lockable)
    check_compiled()
    check_limits()
    check_log(options.log_file)
    node = _prepare(options.cluster)
    root = check_source(source) if bucket is None else None
    metrics: socket.socket | None = None
    try:
        if options.metrics is not None:
            metrics = exporter.listen(options.metrics)
            asked_at = exporter.url(metrics)
        if bucket is None:
            _check_places(source, mountpoint)
        _check_may_mount()
        about = _about_bucket(bucket, how_to_ask) if bucket is not None else _about_directory(source, root)
        with (
            ended_by_signals(),
            claimed(options.disk_cache, options.disk_size, source, mountpoint, about.pop("identity")) as disk,
        ):
            made, supervisor = _check_mountpoint(source, mountpoint), None
            try:
                _check_may_mount_on(mountpoint)
                config = {
                    "source": source,
                    "mountpoint": mountpoint,
                    "capacity": capacity,
                    "residence": kind,
                    "lockable": lockable,
                    "log": os.path.abspath(options.log_file) if options.log_file else "stderr" if foreground else None,
                    "noexec": options.noexec,
                    "revalidate": options.revalidate,
                    "metrics": None if metrics is None else metrics.fileno(),
                    "bound_to": os.getpid() if foreground or bound else None,
                    "peers": node[0] if node else None,
                    "disk": disk,
                    **about,
                }
                with _alone(mountpoint):
                    _check_unmounted(mountpoint)
                    fds = [] if root is None else [root]
                    fds += [*([config["metrics"]] if metrics else []), *([node[0]["listener"]] if node else [])]
                    fds += [disk["directory"]] if disk else []
                    supervisor, report = start(_SUPERVISOR, config, fds, foreground=foreground)
                    await_ready(report, partial(_explain, source, mountpoint))
                _warn(capacity, lockable, kind, have)
                said = sys.stderr if bound else sys.stdout  # the output of `run` is the command's
                cache = f"{sizes.text(capacity)} of cache ({how})"
                if disk is not None:
                    cache += f" and {sizes.text(disk['size'])} on disk ({shown(disk['path'])})"
                print(f"{shown(source)} is mounted on {shown(mountpoint)} with {cache}", file=said, flush=True)
                is_alone = not node and disk is None and kind is Residence.PAGE_CACHE
                fits = is_alone and root is not None and fits_pin(mounts.fstype(root))
                if fits and said.isatty():
                    print(f"`coordlfs pin {shown(source)}` would do without a mount: {FITS}", file=said)
                if root is not None and numbering.are_made_up(mounts.fstype(root)):
                    print(f"coordlfs: {shown(source)} ({config['fstype']}) {numbering.TEXT}", file=sys.stderr)
                if metrics is not None:
                    print(f"metrics: {asked_at}", file=said, flush=True)
            except BaseException:
                if supervisor is not None:
                    _end(supervisor, mountpoint)
                if made:
                    with suppress(OSError):
                        os.rmdir(mountpoint)
                raise
    finally:
        if root is not None:
            os.close(root)
        if metrics is not None:
            metrics.close()
        if node:
            node[1].close()
    return supervisor


def _warn(capacity: int, lockable: int | None, kind: Residence, have: Memory) -> None:
    """Say what the user might not expect of a cache of this size."""
    if kind is Residence.PRIVATE_MEMORY:
        print(
            f"coordlfs: only {sizes.text(lockable or 0)} may be locked, so the cache is in {kind}, and"
            f" {residence.COST}. Allow {sizes.text(residence.wanted(capacity))}: {residence.REMEDY}",
            file=sys.stderr,
        )
    if capacity > have.available:
        print(
            f"coordlfs: the cache may grow to {sizes.text(capacity)}, but only {sizes.text(have.available)}"
            " of memory are available now",
            file=sys.stderr,
        )


def _prepare(cluster: Cluster | None) -> tuple[dict[str, Any], socket.socket] | None:
    if cluster is None:
        return None
    from coordlfs.peers import settings  # here, since a node that stands alone needs none of it

    return settings.prepare(cluster)


def _end(supervisor: subprocess.Popen[bytes], mountpoint: str) -> None:
    supervisor.terminate()
    with suppress(subprocess.TimeoutExpired):
        supervisor.wait(5)
    clear_dead(mountpoint)  # the supervisor does it, unless it was killed
