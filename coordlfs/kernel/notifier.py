"""Notifications to the kernel, and the thread that sends those that may have to wait.

Writing one that drops pages blocks while such a page is being read, and one that drops a name blocks while its
directory is being looked up in: no loop may ever wait for that. Where a page may well be one that is being read, and
from a source that never answers, the thread is one for that notification alone.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from coordlfs.kernel import fuse, threads

_MOST_ALONE = 64  # notifications that have a thread of their own


class Notifier:
    """Writes notifications to the FUSE device, until it is closed."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # A daemon: the kernel may hold its write for as long as a READ of a dead source takes.
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._alone = threading.BoundedSemaphore(_MOST_ALONE)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        """Have `function`, which may block, called soon by the thread: after those that it was given before."""
        self._queue.put(function)

    def send_now(self, message: bytes) -> None:
        """Write a notification; no loop may do so, but for one that touches attributes only and so cannot block."""
        with suppress(OSError):  # ENOENT: the kernel does not know the inode any more
            os.write(self._device, message)

    def is_known(self, node: int) -> bool:
        """Whether the kernel knows a node. It may have to free what it knew: not for the threads that answer."""
        try:
            os.write(self._device, fuse.store_nothing(node))
        except OSError as e:
            return e.errno != errno.ENOENT
        return True

    def drop_pages(self, node: int, offset: int, length: int, then: Callable[[], None]) -> bool:
        """Have a file's pages dropped even where jobs map them, and `then` called.

        By a thread that may be held up for ever by a hung source; False if too many are held up already, or there is no
        thread to be had.
        """
        if not self._alone.acquire(blocking=False):
            return False

        def run() -> None:
            self.send_now(fuse.invalidate_inode(node, offset, length))
            self._alone.release()
            then()

        if threads.start(threading.Thread(target=run, name="notification", daemon=True)):
            return True
        self._alone.release()
        return False

    def close(self) -> None:
        """End the thread, unless the kernel holds it."""
        self._queue.put(None)
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            function()
