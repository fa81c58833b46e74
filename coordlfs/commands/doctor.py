"""`coordlfs doctor`: whether this machine can do what coordlfs needs, and what each thing costs that it cannot.

Every check tries the real thing where that is possible, and changes nothing: version numbers lie, since distributions
port features back and containers forbid what the kernel could do. It examines the machine and knows nothing of what is
mounted: `coordlfs status` does.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata

from coordlfs import sizes
from coordlfs.cache import residence
from coordlfs.cache.residence import Residence
from coordlfs.commands import disk_doctor
from coordlfs.commands.check import Check, State, good, reason
from coordlfs.commands.choice import FITS
from coordlfs.commands.starting import COMPILED
from coordlfs.kernel import fuse, fusermount, limits, memory, mounts, pages, paths, process
from coordlfs.kernel.charges import Charges
from coordlfs.processes import attachment

_MAPPINGS_USUAL = 65530
_FILES_LEAST = 4096
_WATCHES_LEAST = 65536
_IN_MEMORY = f"the cache is in {Residence.PRIVATE_MEMORY}, and {residence.COST}"


# -- FUSE ---------------------------------------------------------------------------------------------------------


def _device() -> Check:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        remedy = "chmod 666 /dev/fuse, or run as root" if e.errno == errno.EACCES else "modprobe fuse"
        remedy += "; a container needs the device (docker: --device /dev/fuse)"
        return Check("/dev/fuse", State.MISSING, reason(e), "nothing can be mounted", remedy, True)
    return good("/dev/fuse", "can be opened")


def _mounting() -> Check:
    name = "right to mount"
    if attachment.is_privileged():
        return good(name, "CAP_SYS_ADMIN")
    if problem := fusermount.problem():
        what, remedy = problem
        found, remedy = f"no CAP_SYS_ADMIN, and {what}", f"{remedy}; a container needs --cap-add SYS_ADMIN"
        cost = "nothing can be mounted" + (", but by `coordlfs run`" if _namespaces().state is State.OK else "")
        return Check(name, State.MISSING, found, cost, remedy, True)
    places = fusermount.confined_to()
    only = f", which AppArmor ({fusermount.PROFILE}) lets mount on {', '.join(places)} only" if places else ""
    return Check(
        name,
        State.WARNING,
        f"no CAP_SYS_ADMIN; {shutil.which(fusermount.PROGRAM)}{only}",
        "mounts by way of fusermount3, of what this user may read; others see them only with user_allow_other;"
        " files larger than 128 KiB are read in smaller steps",
        "run as root for all that coordlfs can do",
    )


def _allow_other() -> Check:
    name = "user_allow_other"
    if fusermount.allows_others():
        return good(name, "in /etc/fuse.conf")
    if attachment.is_privileged():
        return good(name, "not in /etc/fuse.conf; root does not need it")
    return Check(
        name,
        State.WARNING,
        "not in /etc/fuse.conf",
        "only the user who mounts sees the files",
        "write user_allow_other into /etc/fuse.conf",
    )


def _features() -> Iterator[Check]:
    """What the kernel offers in its INIT message, by a mount that is made, asked and gone in a namespace of its own."""
    try:
        offered = _in_child(_ask_init)
    except OSError as e:
        yield Check(
            "FUSE features", State.WARNING, f"cannot be asked ({reason(e)})", "not known", "run the doctor as root"
        )
        return
    minor, flags, flags2 = struct.unpack("=III", offered)
    protocol = f"protocol 7.{minor}"
    if flags & fuse.NO_OPEN_SUPPORT and flags & fuse.NO_OPENDIR_SUPPORT:
        yield good("opening without a request", protocol)
    else:
        yield Check(
            "opening without a request",
            State.MISSING,
            protocol,
            "coordlfs cannot serve at all",
            "Linux 5.1 or newer",
            True,
        )
    if flags2 & fuse.HAS_RESEND:
        yield good("FUSE_NOTIFY_RESEND", protocol)
    else:
        yield Check(
            "FUSE_NOTIFY_RESEND",
            State.WARNING,
            protocol,
            "a server that dies or is replaced leaves its unanswered reads waiting",
            "Linux 6.9 or newer",
        )


def _unshare() -> None:
    """A mount namespace of its own, for as long as a child of this process lives."""
    if attachment.is_privileged():
        process.unshare_mounts()
    else:
        process.unshare_user()


def _namespaces() -> Check:
    name = "user namespaces"

    def unshare() -> bytes:
        process.unshare_user()
        os.close(mounts.detached_copy(b"/proc"))
        return b""

    try:
        _in_child(unshare)
    except OSError as e:
        if attachment.is_privileged():
            return good(name, f"forbidden ({reason(e)}); root does not need them")
        return Check(
            name,
            State.WARNING,
            f"forbidden ({reason(e)})",
            "no `coordlfs run`; a mount is busy for umount and fusermount3 -u, but not for `coordlfs umount`",
            "sysctl user.max_user_namespaces=10000; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, on Debian"
            " kernel.unprivileged_userns_clone=1; containers: allow unshare in seccomp",
        )
    return good(name, "allowed")


def _ask_init() -> bytes:
    _unshare()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
    mounts.mount("coordlfs-doctor", b"/proc/self/fdinfo", "fuse.coordlfs", flags, options)
    request = os.read(device, fuse.REQUEST_BUFFER)
    body = request[fuse.IN_HEADER.size :].ljust(fuse.INIT_IN.size, b"\0")
    _, minor, _, flags, flags2 = fuse.INIT_IN.unpack_from(body)
    return struct.pack("=III", minor, flags, flags2)


def _in_child(action: Callable[[], bytes]) -> bytes:
    """What `action` returns in a process of its own, whose namespace ends with it. Raises OSError."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = b"\0" + action()
        except OSError as e:
            result = bytes([min(e.errno or errno.EIO, 255)])
        except BaseException:
            result = bytes([errno.EIO])
        os.write(writing, result)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as f:
        result = f.read()
    os.waitpid(child, 0)
    if not result or result[0]:
        code = result[0] if result else errno.EIO
        raise OSError(code, os.strerror(code))
    return result[1:]


# -- the kernel ---------------------------------------------------------------------------------------------------


def _kernel() -> Check:
    release = os.uname().release
    try:
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(paths.open_beneath(root, b"proc", os.O_RDONLY))
        finally:
            os.close(root)
    except OSError as e:
        found = f"Linux {release}: openat2 fails ({reason(e)})"
        return Check("kernel", State.MISSING, found, "files cannot be opened safely", "Linux 5.14 or newer", True)
    return good("kernel", f"Linux {release}")


@contextmanager
def _page() -> Iterator[int]:
    """A file of one page, in memory."""
    fd = os.memfd_create("coordlfs-doctor")
    try:
        os.ftruncate(fd, pages.PAGE)
        yield fd
    finally:
        os.close(fd)


def _detached_copies() -> Check:
    try:
        os.close(mounts.detached_copy(b"/"))
    except OSError as e:
        if e.errno == errno.EPERM and not attachment.is_privileged():
            return good("open_tree", "in a user namespace, where these are allowed")
        if e.errno == errno.EPERM:
            cost, remedy = "nothing can be mounted", "containers: allow open_tree in seccomp"
            return Check("open_tree", State.MISSING, "not permitted", cost, remedy, True)
        return Check(
            "open_tree", State.MISSING, reason(e), "a mount would be busy for ever", "Linux 5.2 or newer", True
        )
    return good("open_tree", "works")


def _populate() -> Check:
    try:
        with _page() as fd:
            address = pages.map_file(fd, 0, pages.PAGE)
            try:
                pages.lock(address, pages.PAGE)
            finally:
                pages.unmap(address, pages.PAGE)
    except OSError as e:
        if e.errno in (errno.ENOMEM, errno.EPERM):
            found = f"no memory may be locked ({reason(e)})"
            return Check("pinning a page", State.MISSING, found, _IN_MEMORY, residence.REMEDY)
        return Check(
            "pinning a page",
            State.MISSING,
            f"MADV_POPULATE_READ: {reason(e)}",
            "nothing can be cached",
            "Linux 5.14 or newer",
        )
    return good("pinning a page", "mmap, mlock2 and MADV_POPULATE_READ work")


def _watches() -> Check:
    name = "inotify watches"
    with open("/proc/sys/fs/inotify/max_user_watches") as f:
        most = int(f.read())
    if most >= _WATCHES_LEAST:
        return good(name, f"{most} a user: one for each directory that is pinned")
    return Check(
        name,
        State.WARNING,
        f"{most} a user",
        "in directories beyond that, `coordlfs pin` notices changes within --revalidate only",
        f"sysctl fs.inotify.max_user_watches={_WATCHES_LEAST}",
    )


def _charges() -> Check:
    name = "charges of pages"
    try:
        Charges()
    except OSError as e:
        return Check(
            name,
            State.WARNING,
            f"cannot be seen ({reason(e)})",
            "`coordlfs pin` reads what others have in memory already once more, as it may be charged to them",
            "run it as root, with CAP_SYS_ADMIN",
        )
    return good(name, "can be seen: what is charged where `coordlfs pin` runs is pinned as it is")


def _cachestat() -> Check:
    with _page() as fd:
        found = pages.resident(fd)
    if found is None:
        return Check(
            "cachestat",
            State.WARNING,
            "not there, or not allowed",
            "bytes that the source's page cache holds are read from the disk again; pages charged to jobs may stay so",
            "Linux 6.5 or newer; containers: allow cachestat in seccomp",
        )
    limited = not process.has_capability(process.CAP_FOWNER)
    return good("cachestat", "works, for files that this user may write to" if limited else "works")


def _pressure() -> Check:
    try:
        with open("/proc/pressure/memory") as f:
            line = f.readline().split()
    except OSError as e:
        return Check(
            "pressure stall information",
            State.WARNING,
            reason(e),
            "memory that gets tight is told from what is available alone",
            "boot with psi=1, on a kernel with CONFIG_PSI",
        )
    return good("pressure stall information", f"memory {line[1]}" if len(line) > 1 else "there")


# -- limits and memory --------------------------------------------------------------------------------------------


def _lockable() -> Check:
    most = process.lockable()
    if most is None:
        return good("locked memory", "no limit")
    found = f"at most {sizes.text(most)}"
    if residence.choose(int(memory.memory().available * sizes.AUTO_SHARE), most) is Residence.PAGE_CACHE:
        return good("locked memory", f"{found} a process: enough for --cache-size auto")
    return Check("locked memory", State.WARNING, found, f"for a larger cache: {_IN_MEMORY}", residence.REMEDY)


def _open_files() -> Check:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _FILES_LEAST:
        return good("open files", "no limit" if most == resource.RLIM_INFINITY else f"at most {most}")
    return Check(
        "open files",
        State.WARNING,
        f"at most {most}",
        "many files read at once may fail with EMFILE",
        f"ulimit -n {_FILES_LEAST}",
    )


def _limits() -> Iterator[Check]:
    found = [limit for limit in limits.tight() if limit.name != "ulimit -n"]
    if not found:
        yield good("limits", "of processes, threads, memory and file sizes: wide enough")
    for limit in found:
        yield Check(limit.name, State.WARNING, limit.found, limit.cost, limit.remedy)


def _mappings() -> Check:
    with open("/proc/sys/vm/max_map_count") as f:
        most = int(f.read())
    if most >= _MAPPINGS_USUAL:
        return good("vm.max_map_count", f"{most}: one keeper for so many cached items, less 1000")
    return Check(
        "vm.max_map_count",
        State.WARNING,
        str(most),
        "more keeper processes, 15 MB each",
        "sysctl vm.max_map_count=1048576",
    )


def _cgroup() -> Check:
    with open("/proc/self/mounts", errors="surrogateescape") as f:
        kinds = {line.split()[2] for line in f}
    version = (
        "version 2" if "cgroup2" in kinds and "cgroup" not in kinds else "version 1" if "cgroup" in kinds else "none"
    )
    groups = memory.limits()
    if not groups:
        return good("memory cgroup", f"{version}, no limit")
    directory, limit = min(groups, key=lambda group: group[1])
    return Check(
        "memory cgroup",
        State.WARNING,
        f"{version}, limit {sizes.text(limit)} by {directory}",
        "the cache is charged there and counts against it",
        "raise the limit, or mount from outside of it, for a larger cache",
    )


def _available() -> Check:
    have = memory.memory()
    found = f"{sizes.text(have.available)} of {sizes.text(have.total)} available"
    if have.available < have.total * 0.1:
        return Check(
            "memory", State.WARNING, found, "next to nothing can be cached", "end what takes it, or add memory"
        )
    return good("memory", f"{found}: --cache-size auto takes {sizes.text(have.available * sizes.AUTO_SHARE)}")


# -- libraries ----------------------------------------------------------------------------------------------------


def _pyfuse3() -> Check:
    try:
        import pyfuse3  # its shared library may be missing as well
    except ImportError as e:
        remedy = "apt-get install libfuse3-3, pip install pyfuse3"
        return Check("pyfuse3", State.MISSING, str(e), "links and extended attributes cannot be answered", remedy, True)
    return good("pyfuse3", str(pyfuse3.__version__))


def _compiled() -> Check:
    try:
        for name in COMPILED:
            importlib.import_module(name)
    except ImportError as e:
        remedy = "install coordlfs again, with a C compiler"
        return Check("compiled code", State.MISSING, str(e), "nothing can be served", remedy, True)
    return good("compiled code", ", ".join(COMPILED))


def _prometheus() -> Check:
    try:
        return good("prometheus-client", metadata.version("prometheus-client"))
    except metadata.PackageNotFoundError:
        return Check(
            "prometheus-client", State.WARNING, "not installed", "no --metrics", "pip install 'coordlfs[metrics]'"
        )


def _one(check: Callable[[], Check]) -> Callable[[], Iterator[Check]]:
    def several() -> Iterator[Check]:
        try:
            yield check()
        except Exception as e:  # what cannot be examined says so, and the rest is examined all the same
            name = check.__name__.strip("_").replace("_", " ")
            yield Check(name, State.WARNING, f"cannot be examined: {e}", "not known", "report this")

    return several


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    *map(_one, (_device, _mounting, _allow_other, _namespaces)),
    _features,
    *map(_one, (_kernel, _detached_copies, _populate, _cachestat, _pressure, _watches, _charges)),
    _limits,
    *map(_one, (_lockable, _open_files, _mappings, _cgroup, _available, _pyfuse3, _compiled, _prometheus)),
)


def examine(disk_cache: str | None = None) -> list[Check]:
    """Every check; of the directory for a disk cache as well, if one is given."""
    found = [found for check in CHECKS for found in check()]
    return found if disk_cache is None else [*found, *disk_doctor.examine(disk_cache)]


# What `coordlfs pin` cannot do without.
_OF_PIN = frozenset({"kernel", "pinning a page", "compiled code"})


def works(checks: list[Check]) -> bool:
    """Whether coordlfs can work here at all."""
    return not any(check.required and check.state is State.MISSING for check in checks)


def pins(checks: list[Check]) -> bool:
    """Whether `coordlfs pin` can work here, which mounts nothing."""
    needed = {check.name: check for check in checks if check.name in _OF_PIN}
    return all(check.state is State.OK for check in needed.values())


def show(*, as_json: bool, disk_cache: str | None = None, more: Iterable[Check] = ()) -> bool:
    """Print what was found, and `more`; whether coordlfs can work here, with the disk cache that is given."""
    checks = [*examine(disk_cache), *more]
    if as_json:
        found = {"works": works(checks), "pins": pins(checks), "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=2))
        return works(checks)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {State.OK: "green", State.WARNING: "yellow", State.MISSING: "red"}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in checks:
        table.add_row(
            f"[{colours[check.state]}]{check.state}[/]", f"[bold]{check.name}[/]", escape(paths.shown(check.found))
        )
        if check.cost:
            table.add_row("", "", f"costs: {escape(check.cost)}")
            table.add_row("", "", f"mend:  {escape(check.remedy)}")
    console = Console()
    console.print(table)
    troubles = sum(check.state is not State.OK for check in checks)
    if not works(checks):
        lacking = ", ".join(check.name for check in checks if check.required and check.state is State.MISSING)
        other = "; but `coordlfs pin` can, which mounts nothing" if pins(checks) else ""
        console.print(f"coordlfs cannot mount here, for want of: {lacking}{other}.")
    else:
        console.print("coordlfs works here" + (f", with {troubles} limitation(s)." if troubles else "."))
    console.print(f"{FITS}.", soft_wrap=True)
    return works(checks)
