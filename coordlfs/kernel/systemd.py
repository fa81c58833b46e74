"""What systemd offers over datagram sockets: readiness (sd_notify) and the journal's native protocol.

Both are documented and stable: sd_notify(3), and https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. Neither call waits: a
service manager or journal that does not keep up loses a message, and nobody loses time.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from coordlfs.kernel.paths import shown

JOURNAL = "/run/systemd/journal/socket"
_LONGEST = 1 << 16  # of a field; longer ones would not fit a datagram
_LENGTH = struct.Struct("<Q")


def _send(path: str, message: bytes) -> bool:
    address = b"\0" + os.fsencode(path[1:]) if path.startswith("@") else os.fsencode(path)
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(message, address)
        return True
    return False


def notify(**state: object) -> bool:
    """Tell the service manager, as in `notify(READY=1, STATUS="serves")`; False if there is none that listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    text = "\n".join(f"{key}={shown(str(value))}" for key, value in state.items())
    return bool(path) and _send(path, os.fsencode(text))


def journal_entry(fields: dict[str, object]) -> bytes:
    """A datagram for the journal. Names of fields are upper case letters, digits and underscores."""
    parts = []
    for name, value in fields.items():
        data = str(value).encode(errors="replace")[:_LONGEST]
        # A value with a newline is preceded by its length instead.
        separator = b"\n" + _LENGTH.pack(len(data)) if b"\n" in data else b"="
        parts.append(name.encode() + separator + data + b"\n")
    return b"".join(parts)


def to_journal(fields: dict[str, object], path: str = JOURNAL) -> bool:
    """Write an entry; False if it was lost."""
    return _send(path, journal_entry(fields))


def stderr_is_journal() -> bool:
    """Whether standard error is connected to the journal, as it is in a unit of systemd."""
    with suppress(OSError, ValueError):
        device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
        st = os.fstat(2)
        return (st.st_dev, st.st_ino) == (int(device), int(inode))
    return False
