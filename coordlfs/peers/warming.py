"""Filling the caches of all nodes at once: each fetches what it owns, for as long as somebody wants it.

The wish travels with what a node says of itself (`membership`), and so does how far each has come. It ends everywhere
when whoever asked stops asking, or dies: nobody has to be told. What a node has already is not fetched again, so that
it may be broken off and begun anew. How items are fetched is not known here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import trio

from coordlfs.cache import items
from coordlfs.catalogue.catalog import node_of_path
from coordlfs.kernel import paths, threads
from coordlfs.peers.ownership import Ownership, keys_of
from coordlfs.peers.placement import Placement
from coordlfs.peers.wishes import LONGEST_TEXT, Exchange, Progress, Told, Wish, parse
from coordlfs.sources import layout
from coordlfs.sources.contract import Source
from coordlfs.sources.directory import DirectorySource

_LASTS = 5.0  # seconds that a wish lasts unless it is said again
_LOOK_EVERY = 0.5  # seconds
_LISTED_AT_ONCE = 500_000  # files whose place on the disk is asked for before the first of them is fetched
_BATCH = 64


def owned_bytes(files: list[tuple[bytes, int]], ownership: Ownership, own: str) -> list[int]:
    """Of each of some files, given by path and size, how many bytes belong to the node that is called `own`."""
    chunks = [range(-(-size // items.CHUNK)) for _, size in files]
    ids = np.repeat(
        np.array([node_of_path(path) for path, _ in files], np.uint64), [len(of_file) for of_file in chunks]
    )
    numbers = np.array([number for of_file in chunks for number in of_file], np.uint64)
    owners = ownership.owners(keys_of(ids, numbers)).tolist()
    mine = [node.name for node in ownership.nodes].index(own)
    found, at = [], 0
    for (_, size), of_file in zip(files, chunks, strict=True):
        lengths = (min(items.CHUNK, size - number * items.CHUNK) for number in of_file)
        of_it = owners[at : at + len(of_file)]
        found.append(sum(length for length, owner in zip(lengths, of_it, strict=True) if owner == mine))
        at += len(of_file)
    return found


class Warming:
    """Does what some node of the cluster wishes, one wish at a time. For trio's thread.

    `fetch` has files cached that are named, and returns how many bytes of them are cached here then, and whether what
    follows may find no room. Raises OSError.
    """

    def __init__(
        self,
        source: Source,
        placement: Placement,
        exchange: Exchange,
        fetch: Callable[[list[bytes]], Awaitable[tuple[int, bool]]],
    ) -> None:
        self._source = source
        self._placement = placement
        self._exchange = exchange
        self._fetch = fetch
        self._wish: Wish | None = None  # of somebody here
        self._until = 0.0  # when that ends
        self._progress: Progress | None = None

    # -- who wants what -----------------------------------------------------------------------------------------

    def wish(self, wish: Wish) -> list[dict[str, Any]]:
        """Somebody here wants the caches of all nodes filled, for the next seconds; how far each node has come.

        The progress of a node that has not begun with this wish is None.
        """
        self._wish, self._until = wish, time.monotonic() + _LASTS
        rows = [_row(self._placement.own.name, True, "", self._progress, wish)]
        for member in self._exchange.members:
            rows.append(_row(member.name, member.alive, member.problem, parse(member.warming).progress, wish))
        return rows

    def no_more(self, wish_id: str) -> None:
        """It is not wanted any more."""
        if self._wish is not None and self._wish.id == wish_id:
            self._wish = None

    def _wanted(self) -> Wish | None:
        """The wish that is to be done now: of several the one that is being done, else the least by its name."""
        if time.monotonic() >= self._until:
            self._wish = None
        of_others = (parse(member.warming).wish for member in self._exchange.members if member.alive)
        known = {wish.id: wish for wish in (self._wish, *of_others) if wish is not None}
        if self._progress is not None and self._progress.id in known:
            return known[self._progress.id]
        return known[min(known)] if known else None

    # -- a task of the server -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Do what is wanted, until cancelled."""
        while True:
            wish = self._wanted()
            if wish is not None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._do, wish)
                    while (now := self._wanted()) is not None and now.id == wish.id:
                        self._exchange.told = Told(self._wish, self._progress)
                        await trio.sleep(_LOOK_EVERY)
                    nursery.cancel_scope.cancel()
            self._progress = None
            self._exchange.told = Told(self._wish)
            await trio.sleep(_LOOK_EVERY)

    async def _do(self, wish: Wish) -> None:
        """Fetch what this node owns, and again when the nodes have changed: what one owned that died is others' now."""
        while True:
            self._progress = Progress(wish.id, "listing")
            ownership = self._placement.ownership
            if ownership is not None:
                try:
                    await self._fill(wish, ownership)
                except OSError as e:
                    self._say(state="failed", problem=(e.strerror or str(e))[:LONGEST_TEXT])
            while self._placement.ownership is ownership:
                await trio.sleep(_LOOK_EVERY)

    async def _fill(self, wish: Wish, ownership: Ownership) -> None:
        files, is_full = self._owned(wish, ownership), False
        while some := await threads.run(lambda: list(islice(files, _LISTED_AT_ONCE)), abandon_on_cancel=True):
            self._say(state="filling", more_bytes=sum(nbytes for _, nbytes in some))
            names = await threads.run(partial(self._in_order, [path for path, _ in some]), abandon_on_cancel=True)
            for at in range(0, len(names), _BATCH):
                if self._placement.ownership is not ownership:
                    return
                batch = names[at : at + _BATCH]
                cached, is_full = await self._fetch(batch)
                self._say(more_files=len(batch), more_cached_bytes=cached)
                if is_full and not cached:
                    self._say(state="full")
                    return
        self._say(state="full" if is_full and self._lacks else "done")

    @property
    def _lacks(self) -> bool:
        """Whether something of what this node owns is not cached."""
        return self._progress is not None and self._progress.cached_bytes < self._progress.bytes

    def _say(self, more_files: int = 0, more_cached_bytes: int = 0, more_bytes: int = 0, **changes: str) -> None:
        said = self._progress
        assert said is not None
        self._progress = said._replace(
            files=said.files + more_files,
            cached_bytes=said.cached_bytes + more_cached_bytes,
            bytes=said.bytes + more_bytes,
            **changes,
        )

    def _in_order(self, names: list[bytes]) -> list[bytes]:
        """Files as they are best read: as they lie on a disk, or as they are listed."""
        return layout.by_extent(self._source, names) if isinstance(self._source, DirectorySource) else names

    def _owned(self, wish: Wish, ownership: Ownership) -> Iterator[tuple[bytes, int]]:
        """The files, of those that are wanted, of which something belongs to this node, and how many bytes."""
        files = itertools.chain.from_iterable(
            layout.files(self._source, paths.from_text(start)) for start in wish.paths or ("",)
        )
        while some := list(islice(files, _LISTED_AT_ONCE)):
            owned = owned_bytes(some, ownership, self._placement.own.name)
            yield from ((path, nbytes) for (path, _), nbytes in zip(some, owned, strict=True) if nbytes)


def _row(name: str, alive: bool, problem: str, progress: Progress | None, wish: Wish) -> dict[str, Any]:
    known = progress._asdict() if progress is not None and progress.id == wish.id else None
    return {"name": name, "alive": alive, "problem": problem, "progress": known}
