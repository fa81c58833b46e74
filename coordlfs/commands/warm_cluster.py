"""`coordlfs warm --cluster`: have every node fetch what it owns, and show how far each has come, until all have.

The wish lasts for as long as it is said again: Ctrl-C ends it everywhere, and so does the death of this process. It
asks the mount on this node, and no other node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from coordlfs.commands import client
from coordlfs.errors import UserError
from coordlfs.kernel import paths as kernel_paths
from coordlfs.kernel.paths import shown
from coordlfs.peers.wishes import MOST_PATHS
from coordlfs.sizes import text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_ASK_EVERY = 0.5  # seconds
_BEGINS_WITHIN = 15.0  # seconds, after which a node that is alive and has not begun is not waited for
_SETTLES = 4.0  # seconds without a change of who is alive after which all have to be done: longer than they differ
_UNANSWERED = 60.0  # seconds that the server of this mount may be away, as while it is replaced
_ENDED = frozenset({"done", "full", "failed"})


class Node(NamedTuple):
    """How it stands with one node. Bytes are those that it owns; they are 0 until it has found its files."""

    name: str
    is_alive: bool
    state: str  # as in `coordlfs.peers.wishes`, or "waiting"
    files: int
    cached_bytes: int
    bytes: int
    problem: str

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to come of it."""
        return self.state in _ENDED


def _node(row: dict[str, Any]) -> Node:
    done = row["progress"]
    if done is None:
        return Node(row["name"], row["alive"], "waiting", 0, 0, 0, row["problem"])
    cached = min(done["cached_bytes"], done["bytes"])
    problem = done["problem"] or row["problem"]
    return Node(row["name"], row["alive"], done["state"], done["files"], cached, done["bytes"], problem)


class Asking:
    """Asks the mount, again while its server is replaced."""

    def __init__(self, mountpoint: str, paths: list[str]) -> None:
        self._mountpoint = mountpoint
        self._client = client.Client(mountpoint)
        wanted = self._client.relative(paths)
        self._request: dict[str, Any] = {
            "id": f"{time.time():.6f}-{os.urandom(4).hex()}",  # of several wishes the first is done first
            "paths": [kernel_paths.to_text(path) for path in wanted if path],
        }
        if sum(map(len, self._request["paths"])) > MOST_PATHS:
            raise UserError(f"so many paths cannot be told to other nodes ({MOST_PATHS} characters): name a directory")

    def nodes(self) -> list[Node]:
        """How far each has come, this node first. Raises UserError."""
        until = time.monotonic() + _UNANSWERED
        while True:
            try:
                rows = self._client.ask("warm", **self._request)["nodes"]
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(_ASK_EVERY)
                with suppress(UserError):
                    again = client.Client(self._mountpoint)
                    self._client.close()
                    self._client = again
                continue
            if not rows:
                raise UserError(f"{self._mountpoint} shares its cache with nobody: `coordlfs warm` without --cluster")
            return [_node(row) for row in rows]

    def end(self) -> None:
        """It is not wanted any more."""
        with suppress(UserError, OSError):
            self._client.ask("warm", **self._request, is_over=True)
        self._client.close()


def warm(mountpoint: str, paths: list[str]) -> list[Node]:
    """Have every node fetch what it owns of the files named (or all), until all have; how it stands with each then."""
    asking = Asking(mountpoint, paths)
    try:
        with _shown() as show:
            return _await(asking, show)
    finally:
        asking.end()


def _await(asking: Asking, show: _Bars) -> list[Node]:
    began = time.monotonic()
    alive: set[str] = set()
    changed = began  # when who is alive did so last
    while True:
        nodes, now = asking.nodes(), time.monotonic()
        show.update(nodes)
        if (alive_now := {node.name for node in nodes if node.is_alive}) != alive:
            alive, changed = alive_now, now
        begun = [node for node in nodes if node.is_alive and (node.state != "waiting" or now < began + _BEGINS_WITHIN)]
        if all(node.has_ended for node in begun) and now > changed + _SETTLES:
            return nodes
        time.sleep(_ASK_EVERY)


class _Bars:
    """A bar for each node, and one for all."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._of_all = progress.add_task("all nodes", total=None)
        self._of_node: dict[str, TaskID] = {}

    def update(self, nodes: list[Node]) -> None:
        """Show how it stands."""
        for node in nodes:
            if node.name not in self._of_node:
                self._of_node[node.name] = self._progress.add_task(shown(node.name), total=None)
            state = node.state if node.is_alive else "not alive"
            self._progress.update(
                self._of_node[node.name],
                completed=node.cached_bytes,
                total=node.bytes or None,
                description=f"{shown(node.name)} {state}",
            )
        self._progress.update(
            self._of_all,
            completed=sum(node.cached_bytes for node in nodes),
            total=sum(node.bytes for node in nodes) or None,
        )


@contextmanager
def _shown() -> Iterator[_Bars]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        yield _Bars(progress)


def lines(nodes: list[Node]) -> Iterator[str]:
    """What became of it, for people: a line for all, and one for each node with which something is amiss."""
    here = [node for node in nodes if node.is_alive]
    cached = sum(node.cached_bytes for node in here)
    yield f"{text(cached)} of {text(sum(node.bytes for node in here))} are cached by {len(here)} nodes"
    for node in nodes:
        name = shown(node.name)
        if not node.is_alive:
            yield f"{name} is not alive: {shown(node.problem)}; the others have what it owned"
        elif node.state == "waiting":
            yield f"{name} has not begun within {_BEGINS_WITHIN:.0f} s: is it of an older version?"
        elif node.state == "full":
            yield f"{name} is full, with {text(node.cached_bytes)} of {text(node.bytes)} that it owns"
        elif node.state == "failed":
            yield f"{name} gave up: {shown(node.problem)}"
