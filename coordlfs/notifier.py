"""Notifications to the kernel, sent from a thread of their own.

Writing one that drops pages blocks while such a page is being read, and one that drops a name blocks while its
directory is being looked up in: no lane may ever wait for that. They go out a moment late, after the reply to the
message that caused them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from contextlib import suppress

log = logging.getLogger(__name__)

_DELAY = 0.02  # seconds


class Notifier:
    """Writes notifications to the FUSE device until it is closed."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._queue: queue.PriorityQueue[tuple[float, bytes]] = queue.PriorityQueue()
        # A daemon: the kernel may hold its write for as long as a READ of a dead source takes.
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def send(self, message: bytes, delay: float = _DELAY) -> None:
        """Have a notification written after `delay` seconds."""
        self._queue.put((time.monotonic() + delay, message))

    def send_now(self, message: bytes) -> None:
        """Write a notification that cannot block: one that touches attributes only."""
        with suppress(OSError):  # ENOENT: the kernel does not know the inode any more
            os.write(self._device, message)

    def close(self) -> None:
        """End the thread, unless the kernel holds it."""
        self._queue.put((0.0, b""))
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while True:
            due, message = self._queue.get()
            if not message:
                return
            wait = due - time.monotonic()
            if wait <= 0:
                self.send_now(message)
            else:
                self._queue.put((due, message))
                time.sleep(min(wait, _DELAY))
