"""The server's line to its supervisor: keepers come and go over it.

JSON packets on a SOCK_SEQPACKET pair; a keeper's socket travels as SCM_RIGHTS. It does not know what keepers are asked
to do.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from coordlfs.cache.keeper_protocol import receive, send

if TYPE_CHECKING:
    from coordlfs.peers.sharing import Sharing

if TYPE_CHECKING:
    from coordlfs.cache.admission import Admission


log = logging.getLogger(__name__)


class SupervisorLink:
    """The server's end."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)

    def ready(self) -> None:
        """Tell that requests of the kernel are being answered."""
        send(self._sock, {"ready": True})

    def failed(self, error: BaseException) -> None:
        """Tell why no request will be answered."""
        with suppress(OSError):
            send(self._sock, {"failed": str(error) or type(error).__name__, "errno": getattr(error, "errno", None)})

    def want_keeper(self) -> None:
        """Ask for another keeper: the others hold as many mappings as one process may, or there is none."""
        with suppress(OSError):  # a supervisor that died: `run` sees to it
            send(self._sock, {"want_keeper": True})

    def replace(self, pid: int) -> None:
        """Ask for a new server, or a new keeper, in place of the one with this process id."""
        send(self._sock, {"replace": pid})

    async def run(self, admission: Admission, sharing: Sharing | None, on_death: Callable[[], None]) -> None:
        """Take what the supervisor says, until cancelled or it is dead, which is told by calling `on_death`."""
        self._sock.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                received = receive(self._sock)
            except BlockingIOError:
                continue
            except OSError:
                received = None
            if received is None:
                on_death()
                return
            message, fds = received
            match message, fds:
                case {"lost": int(index)}, []:
                    admission.lose_keeper(index)
                case {"keeper": {"index": int(index), "pid": int(pid)}}, [fd] if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    admission.add_keeper(index, pid, socket.socket(fileno=fd))
                case {"peer_server": int(pid)}, [fd] if sharing and stat.S_ISSOCK(os.fstat(fd).st_mode):
                    sharing.attach(pid, socket.socket(fileno=fd))
                case _:
                    log.warning("the supervisor sent what is no message")
                    for fd in fds:
                        os.close(fd)
