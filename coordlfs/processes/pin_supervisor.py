"""The supervisor of a directory that is pinned: as that of a mount, but that there is nothing to be mounted.

It owns the control socket, by which the pinner is found, so that it is not lost while the pinner is replaced.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from coordlfs.catalogue import memfds
from coordlfs.kernel import mounts
from coordlfs.processes.supervisor import Supervisor, supervise

# As `fuser -v` and `lsof` show it: they ask who keeps a file system from being unmounted.
NAME = "coordlfs pin"
_READAHEAD_KIB = 128  # of a file system that does not say


@dataclass(slots=True)
class PinSupervisor(Supervisor):
    """One directory. `config`: source, capacity (bytes), control, log, …; see `coordlfs.commands.pin`."""

    server_module: ClassVar[str] = "coordlfs.processes.pinner"

    def mount(self) -> None:
        """Have keepers work from the directory itself."""
        assert self.root is not None  # a bucket is not pinned
        self.tree = os.dup(self.root)
        self.readahead = mounts.readahead(os.fstat(self.root).st_dev) or _READAHEAD_KIB
        self.records, self.names = memfds.allocate()

    def _keeper_config(self) -> dict[str, Any]:
        return {"readahead": self.readahead << 10, "in_memory": False, "name": NAME, "gives_way": True}

    def _watch(self, table: int, wake: int) -> bool:
        """As for a mount; whether it is to end. Pages are let go with the keepers, which `close` ends."""
        return Supervisor._watch(self, table, wake) or self.ending

    def _end(self) -> None:
        self.ending = True

    def _is_mounted(self) -> bool:
        return True


def main() -> None:
    """`python -m coordlfs.processes.pin_supervisor JSON`, for `coordlfs pin`."""
    supervise(PinSupervisor)


if __name__ == "__main__":
    main()
