"""Nodes on one machine: network namespaces, joined by veth pairs and a bridge, whose links can be shaped and cut.

Knows nothing of what runs in them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count

from coordlfs_tools.lab.errors import LabError

from coordlfs.kernel.libc import check, libc

_CLONE_NEWNET = 0x40000000
_names = count(1)


def _ip(*arguments: str, program: str = "ip") -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise LabError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace: its name, and its address in the network."""

    namespace: str
    address: str
    hub: str
    port: str  # the hub's end of its link

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command as it runs there, with the mounts of here."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def enter(self) -> None:
        """Move the calling thread there; for `preexec_fn` too."""
        with open(f"/run/netns/{self.namespace}") as there:
            check(libc.setns(there.fileno(), _CLONE_NEWNET), "setns")

    def shape(self, rate: str) -> None:
        """Let the link carry `rate` (as tc writes it: 1mbit, 10gbit) in either direction."""
        for namespace, device in ((self.namespace, "eth0"), (self.hub, self.port)):
            burst = "1mb" if rate.endswith("gbit") else "32kb"
            shape = ["root", "tbf", "rate", rate, "burst", burst, "latency", "50ms"]
            _ip("-n", namespace, "qdisc", "replace", "dev", device, *shape, program="tc")

    def cut(self) -> None:
        """Cut the link: what is sent is lost."""
        _ip("-n", self.hub, "link", "set", self.port, "down")

    def heal(self) -> None:
        """Undo `cut`."""
        _ip("-n", self.hub, "link", "set", self.port, "up")


@contextmanager
def network(hosts: int, rate: str | None = None) -> Iterator[list[Host]]:
    """So many hosts on one network, each with a link of `rate`; all of it is gone at the end."""
    prefix = f"coordlfs-{os.getpid()}-{next(_names)}"
    hub = f"{prefix}-hub"
    made: list[str] = []
    try:
        _ip("netns", "add", hub)
        made.append(hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        found = []
        for number in range(1, hosts + 1):
            host = Host(f"{prefix}-{number}", f"10.77.0.{number}", hub, f"port{number}")
            _ip("netns", "add", host.namespace)
            made.append(host.namespace)
            ends = ["eth0", "netns", host.namespace, "type", "veth", "peer", "name", host.port, "netns", hub]
            _ip("link", "add", *ends)
            _ip("-n", hub, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            if rate is not None:
                host.shape(rate)
            found.append(host)
        yield found
    finally:
        for namespace in reversed(made):
            with suppress(LabError):
                _ip("netns", "del", namespace)
