"""The supervisor of a mount: owns the FUSE device, the mount and the catalogue's memory; restarts what dies.

It does nothing else, so that it has nothing to die of. When the mountpoint is gone, by whichever way it was unmounted,
it lets the keepers go; then the kernel ends the connection as soon as no file is open any more, and with it the server.
A kernel that cannot repeat what was unanswered (before Linux 6.9) gets a new connection with every new server: it is
mounted again, and what was open fails. A process that cannot be kept running is started again and again, ever more
slowly: those who read wait meanwhile, and nothing is unmounted under them.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from coordlfs import logs
from coordlfs.cache import keeper_protocol
from coordlfs.cache.residence import Residence
from coordlfs.catalogue import memfds
from coordlfs.kernel import fuse, mounts, process
from coordlfs.processes import attachment, disk, holders, interpreter

log = logging.getLogger(__name__)

# What the source's device has, but enough to read large files fast through FUSE (measured: 128 KiB reads a file of
# 400 MB at 0.4 of the disk's speed, 512 at 0.6, 4096 at all of it), and not so much that random faults read megabytes.
_READAHEAD_KIB = (512, 4096)
_LEAST_READAHEAD_KIB = 128  # what the kernel has unless it is told
_AT_ONCE = 4  # failures in a row after which the next process is started at once
_SOON, _LATEST = 0.25, 30.0  # seconds until the one after that is started, and at most
_PROVEN = 10.0  # seconds after which a process that works is taken to go on doing so
# How somebody else, or the kernel for want of memory, ends a process: no mistake of its own.
_ENDED_BY_OTHERS = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGQUIT})
_LOOK_EVERY = 1.0  # seconds
_LEAVING = 1.0  # seconds after which a process whose main thread has ended is held up by another thread
_END_WITHIN = 5.0  # seconds that what was killed is waited for
_ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
NO_RESEND = "COORDLFS_NO_RESEND"  # set in the environment: do as on a kernel before 6.9 (for tests)


@dataclass(slots=True)
class Backoff:
    """When to start the next of a kind of process: at once, then ever later while they fail one after the other."""

    failures: int = 0  # in a row
    due: float = 0.0

    def failed(self, now: float) -> float:
        """One more has failed; in how many seconds the next one is due."""
        self.failures += 1
        late = min(self.failures - _AT_ONCE, 30)
        pause = min(_LATEST, _SOON * 2**late) if late > 0 else 0.0
        self.due = now + pause
        return pause

    def works(self) -> None:
        """One has proved that it works."""
        self.failures, self.due = 0, 0.0


@dataclass(slots=True)
class _Keeper:
    index: int
    process: subprocess.Popen[bytes]
    ours: socket.socket  # the server's end: it outlives servers


@dataclass(slots=True)
class Supervisor:
    """One mount. `config`: source, mountpoint, capacity (bytes), residence, log, …; see `coordlfs.commands.mount`."""

    server_module: ClassVar[str] = "coordlfs.processes.server"

    config: dict[str, Any]
    root: int | None  # of a directory
    device: int = -1
    tree: int = -1
    is_busy: bool = False  # whether the tree makes `umount` busy
    readahead: int = _READAHEAD_KIB[0]  # KiB that the kernel reads ahead on the mount
    mounted: mounts.Mount | None = None  # as it was when it was mounted
    mountpoint: bytes = b""  # where to mount; one that was moved meanwhile is mounted again where it is
    bound: list[bytes] = field(default_factory=list)  # where else, when it is mounted again
    memory_fds: dict[int, int] = field(default_factory=dict)  # of the cache's memory, by process
    records: int = -1
    names: int = -1
    init: bytes = b""
    resend: bool = True  # the kernel repeats what was unanswered
    keepers: dict[int, _Keeper] = field(default_factory=dict)
    next_index: int = 1
    server: subprocess.Popen[bytes] | None = None
    link: socket.socket | None = None
    peer_server: _Keeper | None = None
    leaving_since: float | None = None  # when the server's main thread was first seen to have ended
    delayed: list[subprocess.Popen[bytes]] = field(default_factory=list)  # servers that a thread keeps from ending
    ending: bool = False
    ready_since: float | None = None  # when the server said that it serves
    servers: Backoff = field(default_factory=Backoff)
    mounts_again: bool = False  # before the next server can be started
    keeper_backoff: Backoff = field(default_factory=Backoff)
    keeper_since: float = 0.0  # when the last one was started
    replaced: set[int] = field(default_factory=set)  # processes that were ended to be replaced
    keepers_missing: int = 0
    peer_server_pause: float = 0.0
    tell_holders_at: float | None = None  # when to say for whose sake the processes stay, though nothing is mounted

    def __post_init__(self) -> None:
        self.mountpoint = os.fsencode(self.config["mountpoint"])

    # -- beginning ----------------------------------------------------------------------------------------------

    def mount(self) -> None:
        """Mount, and settle with the kernel what both can do. Raises OSError, with nothing left mounted."""
        mountpoint = self.mountpoint
        self.device = attachment.attach(self.config["source"], mountpoint, noexec=self.config["noexec"])
        try:
            self._answer_init()
            self.tree, self.is_busy = attachment.copy(mountpoint)
            self.mounted = next(
                m
                for m in reversed(list(mounts.table()))
                if m.point == mountpoint and m.fstype == attachment.FSTYPE.encode()
            )
            self._set_readahead()
            if self.records < 0:
                self.records, self.names = memfds.allocate()
        except BaseException:
            with suppress(OSError):
                attachment.detach(mountpoint, lazy=True)
            os.close(self.device)
            self.device = -1
            raise

    def _set_readahead(self) -> None:
        if self.records >= 0:  # mounted again: a source that went away since must not be asked by this process
            mounts.set_readahead(self._device, self.readahead)
            return
        least, most = _READAHEAD_KIB
        of_source = most if self.root is None else mounts.readahead(os.fstat(self.root).st_dev)
        wanted = min(most, max(least, of_source or 0))
        if mounts.set_readahead(self._device, wanted):
            self.readahead = wanted
        else:  # it is root's to set
            self.readahead = mounts.readahead(self._device) or _LEAST_READAHEAD_KIB
            log.info(
                "the kernel reads %d KiB ahead, and may be told so by root only: large files are read slower",
                self.readahead,
            )

    def _answer_init(self) -> None:
        self.init = os.read(self.device, fuse.REQUEST_BUFFER)
        acl = self.config["acl"] and attachment.kernel_checks_access()
        reply, features = fuse.init_reply(self.init, acl=acl)
        self.resend = features.resend and NO_RESEND not in os.environ
        if not (features.zero_request_open and features.zero_request_opendir):
            raise OSError(38, "this kernel's FUSE is too old: Linux 5.1 or newer is needed")
        os.write(self.device, reply)

    def start(self) -> None:
        """Start keeper and server."""
        if self.config["capacity"]:
            self._start_keeper()
        if self.config["peers"]:
            self._start_peer_server()
        self._start_server()

    def _spawn(self, module: str, config: dict[str, Any], fds: list[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*interpreter.command(module), json.dumps(config)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # numpy's threads spin, and have nothing to do here
            start_new_session=True,  # Ctrl-C is the supervisor's to handle
        )

    @property
    def in_memory(self) -> bool:
        """Whether the cache is in private memory."""
        return bool(self.config["residence"] == Residence.PRIVATE_MEMORY and self.config["capacity"])

    @contextmanager
    def _cache_memory(self) -> Iterator[list[int]]:
        """The cache's memory, where it is private memory, as a descriptor to pass on; else nothing.

        Server and keeper hold it, each for the other, and this process does not: if memory runs out the kernel ends
        these two, and must have gained by it. So who is started gets it from who is left, or begins with nothing.
        """
        if not self.in_memory:
            yield []
            return
        fd = -1
        for child in [self.server, *(keeper.process for keeper in self.keepers.values())]:
            with suppress(OSError):
                if child is not None and child.poll() is None:
                    fd = os.open(f"/proc/{child.pid}/fd/{self.memory_fds[child.pid]}", os.O_RDWR | os.O_CLOEXEC)
                    break
        if fd < 0:
            fd = memfds.cache(self.config["capacity"])
        try:
            yield [fd]
        finally:
            os.close(fd)

    def _start_keeper(self) -> _Keeper:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            config = self._keeper_config() | {"parent": os.getpid(), "socket": theirs.fileno(), "tree": self.tree}
            with self._cache_memory() as memory:
                child = self._spawn("coordlfs.cache.keeper", config, [theirs.fileno(), self.tree, *memory])
                self.memory_fds.update((child.pid, fd) for fd in memory)
        keeper = _Keeper(self.next_index, child, ours)
        self.next_index += 1
        self.keepers[keeper.index] = keeper
        self.keeper_since = time.monotonic()
        return keeper

    def _keeper_config(self) -> dict[str, Any]:
        return {"readahead": self.readahead << 10, "in_memory": self.in_memory}

    @property
    def _clients(self) -> list[_Keeper]:
        """The processes that use the mount."""
        return [*self.keepers.values(), *([self.peer_server] if self.peer_server else [])]

    def _start_peer_server(self) -> _Keeper:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        listener = self.config["peers"]["listener"]
        with theirs:
            config = self.config["peers"] | {
                "parent": os.getpid(),
                "capacity": self.config["capacity"] + disk.size(self.config),
                "log": self.config["log"],
                "socket": theirs.fileno(),
                "tree": self.tree,
            }
            child = self._spawn("coordlfs.peers.server", config, [theirs.fileno(), self.tree, listener])
        self.peer_server = _Keeper(0, child, ours)
        return self.peer_server

    def _start_server(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            config = self.config | {
                "parent": os.getpid(),
                "device": self.device,
                "mount_device": self._device,
                "records": self.records,
                "names": self.names,
                "root": self.root,
                "link": theirs.fileno(),
                "init": self.init.hex(),
                "resend": self.resend,
                "keepers": [
                    {"index": k.index, "pid": k.process.pid, "socket": k.ours.fileno()} for k in self.keepers.values()
                ],
                "is_busy": self.is_busy,
            }
            fds = [self.records, self.names, theirs.fileno()]
            fds += [] if self.root is None else [self.root]
            fds += [self.device] if self.device >= 0 else []
            fds += [k.ours.fileno() for k in self.keepers.values()]
            fds += [self.config[socket_] for socket_ in ("metrics", "control") if self.config.get(socket_) is not None]
            if self.config.get("disk"):
                fds.append(self.config["disk"]["directory"])
            if self.peer_server is not None:
                of_it = self.peer_server.ours.fileno()
                config["peer_server"] = {"pid": self.peer_server.process.pid, "socket": of_it}
                fds.append(of_it)
            with self._cache_memory() as memory:
                config["memory"] = next(iter(memory), None)
                self.server = self._spawn(self.server_module, config, fds + memory)
                self.memory_fds.update((self.server.pid, fd) for fd in memory)
        if self.link is not None:
            self.link.close()
        self.link, self.ready_since = ours, None

    # -- living -------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server answers. Raises OSError if it does not."""
        assert self.link is not None
        if not process.is_readable(self.link.fileno(), timeout):
            raise OSError(110, "the server did not come up in time")
        said = keeper_protocol.receive(self.link)
        if said is None:
            raise OSError(0, "the server ended as soon as it was started")
        if "failed" in said[0]:
            raise OSError(said[0].get("errno"), said[0]["failed"])
        self.ready_since = time.monotonic()

    def run(self, bound_to: int | None) -> None:
        """Watch over the mount until it is gone; unmount when the parent `bound_to` ends, if there is one."""
        wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        for number in (*_ENDING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        if bound_to is not None:
            process.end_with_parent(bound_to, signal.SIGTERM)
        with open("/proc/self/mountinfo", "rb") as table:
            while True:
                try:
                    if self._watch(table.fileno(), wake_in):
                        return
                except OSError as e:  # no descriptor, no memory: that passes, and must not take the mount away
                    log.error("the supervisor is delayed: %s", e)
                    time.sleep(_LOOK_EVERY)

    def _watch(self, table: int, wake: int) -> bool:
        """Wait until something happens, and see to it; whether the mount is gone. Raises OSError."""
        poll = select.poll()
        poll.register(table, select.POLLPRI | select.POLLERR)
        poll.register(wake, select.POLLIN)
        if self.server is not None:
            assert self.link is not None
            poll.register(self.link, select.POLLIN)
        elif self.device >= 0:
            poll.register(self.device, 0)  # nobody else notices that the connection has ended
        now = time.monotonic()
        due = self.servers.due if self.server is None else now + _LOOK_EVERY
        events = dict(poll.poll(max(0, int(min(due - now, _LOOK_EVERY) * 1000) + 1)))
        if wake in events and set(_ENDING) & set(os.read(wake, 512)):
            if self.mounts_again:
                return True  # it is not mounted just now
            if not self.ending:
                self._end()
        if not self.ending and not self.mounts_again and not self._is_mounted():
            self._release()
        if self.link is not None and self.link.fileno() in events:
            self._hear()
        if self.tell_holders_at is not None and time.monotonic() >= self.tell_holders_at:
            self._tell_holders()
        self._replace_keepers()
        self._replace_peer_server()
        self.delayed = [server for server in self.delayed if server.poll() is None]
        if self.server is None:
            if self.device in events:
                return True
            self._start_server_if_due()
            return False
        status = self._server_status()
        if status is not None and status != 0:
            self._bury_server(status)
        return status == 0

    def _bury_server(self, status: int) -> None:
        """A server has ended: settle when the next one is started."""
        assert self.server is not None
        now = time.monotonic()
        if self.server.pid in self.replaced:
            log.info("server %d is replaced", self.server.pid)
        else:
            log.error("the server ended with status %d", status)
        if self.ready_since is not None and (status in _ENDED_BY_OTHERS or now - self.ready_since > _PROVEN):
            self.servers.works()
        if self.ready_since is None or status not in _ENDED_BY_OTHERS:
            pause = self.servers.failed(now)
            if pause >= 1:
                log.critical("the server cannot be kept running: the next one in %.0f s; who reads waits", pause)
        self.server = None
        self.mounts_again = not self.resend and not self.ending
        self._start_server_if_due()

    def _start_server_if_due(self) -> None:
        """Start a server, unless it is too early; where that cannot be done, as for want of memory, it is put off."""
        now = time.monotonic()
        if now < self.servers.due:
            return
        try:
            if self.mounts_again:
                self._mount_again()
            self._start_server()
        except OSError as e:
            log.error("no server can be started: %s; trying again in %.1f s", e, self.servers.failed(now))

    def _server_status(self) -> int | None:
        """How the server ended; None while it runs.

        One whose main thread has ended answers nobody, but is there as long as a thread of it waits for a source that
        does not answer, and no signal ends that: its successor does not wait for it.
        """
        assert self.server is not None
        left = process.exit_status(self.server.pid)  # before it is waited for, which takes it out of /proc
        status = self.server.poll()
        if status is not None or left is None:
            self.leaving_since = None
            return status
        now = time.monotonic()
        self.leaving_since = self.leaving_since or now
        if now - self.leaving_since < _LEAVING:
            return None
        log.warning("server %d has ended, but a thread of it waits for the source or the disk cache", self.server.pid)
        self.delayed.append(self.server)
        self.leaving_since = None
        return left if self.ending else left or -signal.SIGKILL  # before it is unmounted, none ends well

    def _mount_again(self) -> None:
        """Give the next server a connection of its own; what is open on the old one fails. Raises OSError."""
        if self.device >= 0:
            log.warning("this kernel cannot repeat what was unanswered: mounting again; files that are open fail")
            if elsewhere := self._elsewhere():
                log.warning("the mount namespace of process %s keeps the old mount: it fails", holders.text(elsewhere))
            # Where a directory of it is bound, it fails: who reads must not see what lies below.
            whole = [place for place in self._places() if place.root == b"/"]
            self.mountpoint, *self.bound = [place.point for place in whole] or [self.mountpoint]
            attachment.detach_all(whole, abort=True)
            self.replaced |= {client.process.pid for client in self._clients}
            self._end_clients()
            os.close(self.tree)
            os.close(self.device)
            self.device = -1
        self.mount()
        self.mounts_again = False
        for place in self.bound:
            with suppress(OSError):
                mounts.bind(self.mountpoint, place)

    def _hear(self) -> None:
        assert self.link is not None
        try:
            received = keeper_protocol.receive(self.link)
        except OSError:  # it died with messages unread
            return
        if not received:
            return
        if "ready" in received[0]:
            self.ready_since = time.monotonic()
        if self.ending:
            return
        if "want_keeper" in received[0]:
            self.keepers_missing += 1  # started by `_replace_keepers`
        if isinstance(pid := received[0].get("replace"), int):
            self._replace(pid)

    def _replace(self, pid: int) -> None:
        """End a process as anything else may end it; its successor is of the version that is installed by now."""
        for child in [self.server, *(client.process for client in self._clients)]:
            if child is not None and child.pid == pid:
                self.replaced.add(pid)
                child.kill()

    def _tell_keeper(self, keeper: _Keeper) -> None:
        assert self.link is not None
        message = {"keeper": {"index": keeper.index, "pid": keeper.process.pid}}
        with suppress(OSError):  # a server that is gone is told by its successor's configuration
            keeper_protocol.send(self.link, message, (keeper.ours.fileno(),))

    def _replace_keepers(self) -> None:
        for keeper in [k for k in self.keepers.values() if k.process.poll() is not None]:
            del self.keepers[keeper.index]
            keeper.ours.close()
            if self.ending:
                continue
            now = time.monotonic()
            if keeper.process.pid in self.replaced:
                log.info("keeper %d is replaced", keeper.process.pid)
            else:
                log.error("keeper %d ended with status %s", keeper.process.pid, keeper.process.returncode)
                if now - self.keeper_since > _PROVEN:
                    self.keeper_backoff.works()
                pause = self.keeper_backoff.failed(now)
                if pause >= 1:
                    log.critical("keepers keep dying: is there too little memory? The next in %.0f s", pause)
            assert self.link is not None
            with suppress(OSError):
                keeper_protocol.send(self.link, {"lost": keeper.index})
            self.keepers_missing += 1
        while self.keepers_missing and not self.ending and time.monotonic() >= self.keeper_backoff.due:
            try:
                self._tell_keeper(self._start_keeper())
                self.keepers_missing -= 1
            except OSError as e:
                log.error("no keeper can be started: %s; trying again", e)
                self.keeper_backoff.failed(time.monotonic())
                break

    def _replace_peer_server(self) -> None:
        old = self.peer_server
        if old is None or self.ending or old.process.poll() is None:
            return
        now = time.monotonic()
        if old.process.pid in self.replaced:
            log.info("peer server %d is replaced", old.process.pid)
        elif not self.peer_server_pause:
            log.error("the peer server %d ended with status %s", old.process.pid, old.process.returncode)
            self.peer_server_pause = now + 1.0
        if now < self.peer_server_pause:
            return
        try:
            new = self._start_peer_server()
        except OSError as e:
            self.peer_server_pause = now + _LOOK_EVERY
            log.error("no peer server can be started: %s; trying again", e)
            return
        self.peer_server_pause = 0.0
        old.ours.close()
        assert self.link is not None
        with suppress(OSError):
            keeper_protocol.send(self.link, {"peer_server": new.process.pid}, (new.ours.fileno(),))

    # -- ending -------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> int:
        return self.mounted.device if self.mounted is not None else 0

    def _places(self) -> list[mounts.Mount]:
        return holders.places(self.mounted) if self.mounted is not None else []

    def _elsewhere(self) -> list[holders.Process]:
        return holders.of_namespaces(self.mounted) if self.mounted is not None else []

    def _end(self) -> None:
        """Do as if somebody had unmounted it."""
        attachment.detach_all(self._places())

    def _is_mounted(self) -> bool:
        return bool(self._places())

    def _release(self) -> None:
        """The mountpoint is gone: end the keepers, whose files are all that still holds the file system."""
        self.ending = True
        self.tell_holders_at = time.monotonic() + _LOOK_EVERY
        os.close(self.tree)
        # Not waited for: one that waits for the server ends when that answers.
        for client in self._clients:
            client.process.kill()

    def _tell_holders(self) -> None:
        # Of files that are open nothing is said: to look for them may wait for any file system.
        self.tell_holders_at = None
        if found := self._elsewhere():
            who = holders.text(found)
            log.warning("unmounted, but for the mount namespace of process %s: the mount ends with that", who)

    def _end_clients(self) -> None:
        """Kill keepers and peer server; what the kernel does not let go ends later, by itself."""
        clients = self._clients
        for client in clients:
            client.process.kill()
        for client in clients:
            with suppress(subprocess.TimeoutExpired):
                client.process.wait(_END_WITHIN)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._end_clients()
        if self.server is not None and self.server not in self.delayed:
            self.server.kill()
            with suppress(subprocess.TimeoutExpired):
                self.server.wait(_END_WITHIN)
        if not self.ending:
            attachment.detach_all(self._places(), abort=True)


def supervise(make: Callable[[dict[str, Any], int], Supervisor]) -> None:
    """Run a supervisor as the JSON of the command line says, and report to the descriptor `report` when it serves."""
    config = json.loads(sys.argv[1])
    report, root, bound_to = config.pop("report"), config.pop("root"), config.pop("bound_to")
    process.set_name("coordlfs-superv")
    process.settle(is_service=True)  # those that it starts inherit it
    logs.configure(config["log"], "supervisor", config["mountpoint"], config["source"])
    os.chdir("/")
    supervisor = make(config, root)
    for number in _ENDING:  # until `run`: what there is by then is closed below
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, _exit_once)
    try:
        try:
            supervisor.mount()
            os.setsid()  # only now: see `coordlfs.commands.mount`
            supervisor.start()
            supervisor.wait_ready(30)
        except OSError as e:
            _tell(report, {"errno": e.errno, "error": e.strerror or str(e)})
            sys.exit(1)
        if not _tell(report, {"ready": True, "pid": os.getpid()}):
            sys.exit(1)  # who asked for the mount was killed meanwhile
        supervisor.run(bound_to)
    finally:
        supervisor.close()


def _exit_once(*_: object) -> None:
    """End, and let no other signal disturb that: a terminal sends it here and to who mounts, who then sends another."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _tell(report: int, message: dict[str, Any]) -> bool:
    """Whether there is still somebody to be told."""
    try:
        os.write(report, json.dumps(message).encode())
    except OSError:
        return False
    finally:
        os.close(report)
    return True


def main() -> None:
    """`python -m coordlfs.processes.supervisor JSON`, for `coordlfs mount`."""
    supervise(Supervisor)


if __name__ == "__main__":
    main()
