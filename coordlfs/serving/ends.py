"""Whether the kernel will take a short reply for the end of a file.

It shows a file as long as it was last told, until a READ comes back short: that is where the file ends by now. But it
does not listen if it was notified about the inode after it sent the READ, and would show zeros up to the end that it
knows. Whether it was cannot be told from the request. So of an inode that the kernel was notified about, a READ that
would be answered short is refused once: what was to be read ahead, the kernel then asks for page by page, and what it
asks for after the refusal it sent after the notification. The reader sees nothing of it, but for one that faults in a
single page behind which its mapping goes on: of a file whose end has not come down no READ is refused, therefore. No
I/O here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordlfs.kernel.pages import PAGE

_INODES = 10_000  # that are remembered, those that were notified about last
_REFUSALS = 64  # for each
_MARKS = 1 << 13  # bytes; `coordlfs.serving.plain_path` looks at them


class Ends:
    """The inodes that the kernel was notified about, and which READs were refused since. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By node: the pages, and the largest size that the kernel may believe in.
        self.notified_of: OrderedDict[int, tuple[list[range], int]] = OrderedDict()
        self.marks = bytearray(_MARKS)  # a bit for each node that may be among them, by its number's last bits

    def notified(self, node: int, size: int) -> None:
        """The kernel, which may take it to have `size` bytes, is about to be notified about an inode."""
        with self._lock:
            self.marks[node >> 3 & _MARKS - 1] |= 1 << (node & 7)
            _, before = self.notified_of.get(node, ((), 0))
            self.notified_of[node] = [], max(size, before)
            self.notified_of.move_to_end(node)
            if len(self.notified_of) > _INODES:
                self.notified_of.popitem(last=False)

    def knows(self, node: int) -> bool:
        """Whether `refuses` may say so."""
        return node in self.notified_of

    def refuses(self, node: int, offset: int, size: int, end: int) -> bool:
        """Whether to refuse a READ of `size` bytes at `offset`, whose answer ends at `end`, before all of these.

        No two READs that the kernel has sent for its cache at a time have a page in common.
        """
        if not self.knows(node):
            return False
        with self._lock:
            refused, size_believed = self.notified_of.get(node, ([], 0))
            if end >= size_believed or any(end // PAGE in pages for pages in refused):
                return False
            del refused[: 1 - _REFUSALS]
            refused.append(range(offset // PAGE, -(-(offset + size) // PAGE)))
            return True
