"""A control socket: requests and replies in JSON, one line each, from root and the user whose process it is.

It does not know what may be asked for.
"""

from __future__ import annotations

import array
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

log = logging.getLogger(__name__)

MAX_LINE = 1 << 22
_PEER = struct.Struct("3i")

# What answers one kind of request, with what becomes JSON, or with a descriptor, which is sent.
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | int]]


class ControlSocket:
    """Answers at a socket that listens, by the verb that a request names."""

    def __init__(self, sock: socket.socket, verbs: dict[str, Verb]) -> None:
        self._sock = sock
        self._verbs = verbs

    async def run(self) -> None:
        """Accept connections until cancelled."""
        self._sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sock))
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, uid, _ = _PEER.unpack(credentials)
        if uid not in (0, os.geteuid()):
            log.warning("user %d was refused at the control socket", uid)
            return
        try:
            pending = b""
            async for data in stream:
                pending += data
                *lines, pending = pending.split(b"\n")
                if len(pending) > MAX_LINE:
                    raise ValueError("a request is too long")
                for line in lines:
                    await self._answer(stream, line)
        except Exception as e:  # whatever a client sends, it ends its own connection only
            log.warning("control connection closed: %r", e)

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> None:
        request = json.loads(line)
        verb = request.get("verb") if isinstance(request, dict) else None
        if verb not in self._verbs:
            raise ValueError(f"unknown request {verb!r}")
        reply = await self._verbs[verb](request)
        if isinstance(reply, int):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reply]))]
            await stream.socket.sendmsg([b"\n"], rights)
        else:
            await stream.send_all(json.dumps(reply).encode() + b"\n")
