"""The server's line to its supervisor: keepers come and go over it.

JSON packets on a SOCK_SEQPACKET pair; a keeper's socket travels as SCM_RIGHTS.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from coordlfs.wire import receive, send

if TYPE_CHECKING:
    from coordlfs.admission import Admission


class SupervisorLink:
    """The server's end."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)

    def ready(self) -> None:
        """Tell that messages of the kernel are being answered."""
        send(self._sock, {"ready": True})

    def want_keeper(self) -> None:
        """Ask for another keeper: the others hold as many mappings as one process may."""
        send(self._sock, {"want_keeper": True})

    async def run(self, admission: Admission, on_death: Callable[[], None]) -> None:
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
            if "lost" in message:
                admission.lose_keeper(message["lost"])
            elif "keeper" in message:
                keeper = message["keeper"]
                admission.add_keeper(keeper["index"], keeper["pid"], socket.socket(fileno=fds[0]))
            elif "peer_server" in message and admission.sharing is not None:
                admission.sharing.attach(message["peer_server"], socket.socket(fileno=fds[0]))
