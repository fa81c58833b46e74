"""Notifications to the kernel, sent from a thread of their own.

Writing one that drops pages blocks while such a page is being read, and one that drops a name blocks while its
directory is being looked up in: no loop may ever wait for that. They go out a moment late, after the reply to the
message that caused them. Where a page may well be one that is being read, and from a source that never answers, the
thread is one for that notification alone.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from coordlfs.kernel import threads

log = logging.getLogger(__name__)

_DELAY = 0.02  # seconds
_MOST_ALONE = 64  # notifications that have a thread of their own


class Notifier:
    """Writes notifications to the FUSE device, and calls what follows them, until it is closed."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._count = itertools.count()
        self._queue: queue.PriorityQueue[tuple[float, int, Callable[[], None] | None]] = queue.PriorityQueue()
        # A daemon: the kernel may hold its write for as long as a READ of a dead source takes.
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._alone = threading.BoundedSemaphore(_MOST_ALONE)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def send(self, message: bytes, delay: float = _DELAY) -> None:
        """Have a notification written after `delay` seconds."""
        self.call(lambda: self.send_now(message), delay)

    def call(self, function: Callable[[], None], delay: float = _DELAY) -> None:
        """Have `function` called after `delay` seconds, and after what was to be sent before."""
        self._queue.put((time.monotonic() + delay, next(self._count), function))

    def send_now(self, message: bytes) -> None:
        """Write a notification; no loop may do so, but for one that touches attributes only and so cannot block."""
        with suppress(OSError):  # ENOENT: the kernel does not know the inode any more
            os.write(self._device, message)

    def send_alone(self, message: bytes, then: Callable[[], None]) -> bool:
        """Have a notification written now and `then` called, by a thread that may be held up for ever by a hung source.

        False if too many are held up already, or there is no thread to be had.
        """
        if not self._alone.acquire(blocking=False):
            return False

        def run() -> None:
            self.send_now(message)
            self._alone.release()
            then()

        if threads.start(threading.Thread(target=run, name="notification", daemon=True)):
            return True
        self._alone.release()
        return False

    def close(self) -> None:
        """End the thread, unless the kernel holds it."""
        self._queue.put((0.0, next(self._count), None))
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while True:
            job = due, _, function = self._queue.get()
            if function is None:
                return
            wait = due - time.monotonic()
            if wait <= 0:
                function()
            else:
                self._queue.put(job)
                time.sleep(min(wait, _DELAY))
