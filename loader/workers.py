"""A job's own workers: started with it, replaced when they die, ended with it.

What they do is known by `worker`.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
from coordlfs_loader import deaths, worker
from coordlfs_loader.worker import Preparer
from torch._utils import ExceptionWrapper

log = logging.getLogger("coordlfs_loader")

_MOST_DEATHS, _WITHIN = 10, 60.0  # so many in so many seconds are too many
# Workers, one after the other, that may end before they have begun, however long that takes: by themselves, or killed.
_NOT_BEGUN, _NOT_BEGUN_KILLED = 2, 5
_GOODBYE = 5.0  # seconds for a worker to end by itself


class Workers:
    """The processes. Used by one thread at a time."""

    def __init__(
        self,
        count: int,
        context: Any,
        preparer: Preparer,
        dataset: Any,
        init: Callable[[int], None] | None,
        path: Path,
        name: str,
    ) -> None:
        self._context = context
        self._arguments = (preparer, dataset, init)
        self._path = path
        self._name = name
        self._count = count
        self._seed = int(torch.initial_seed())
        self._oom = deaths.oom_kills()
        self._deaths: deque[float] = deque()
        self._started = 0
        self._begun: set[str] = set()  # names of those that could begin
        self._failed = self._killed = 0  # that could not, one after the other
        self._processes: dict[int, tuple[Any, Pipe, str]] = {}
        self._filenos: tuple[int, ...] = ()
        for number in range(count):
            self._start(number)

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        preparer, dataset, init = self._arguments
        name = f"{self._name}-{self._started}"
        self._started += 1
        seed = self._seed + number
        process = self._context.Process(
            target=worker.main,
            args=(preparer, dataset, init, number, self._count, seed, self._path, name, os.getpid(), theirs),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._processes[number] = (process, ours, name)
        processes = self._processes.values()
        self._filenos = tuple(fd for process, pipe, _ in processes for fd in (process.sentinel, pipe.fileno()))

    def filenos(self) -> tuple[int, ...]:
        """What to wait for: each can be read when `look` has something to see."""
        return self._filenos

    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process, _, _ in self._processes.values()]

    def look(self) -> list[tuple[str, str]]:
        """Replace those that died; names and causes of death. Raises what a worker could not begin for."""
        lost = []
        for number, (process, pipe, name) in list(self._processes.items()):
            alive = process.is_alive()  # first, since the last that it said is to be heard
            self._hear(pipe, name)
            if alive:
                continue
            process.join()
            pipe.close()
            now = deaths.oom_kills()
            why = f"worker {number} (pid {process.pid}) {deaths.describe(process.exitcode or 0, self._oom, now)}"
            self._oom = now
            if name not in self._begun:
                self._count_failure(process.exitcode or 0, why)
            self._begun.discard(name)
            log.warning("%s; another takes its place", why)
            lost.append((name, why))
            self._start(number)
            self._deaths.append(time.monotonic())
            while self._deaths[0] < time.monotonic() - _WITHIN:
                self._deaths.popleft()
            if len(self._deaths) > _MOST_DEATHS:
                raise RuntimeError(f"{len(self._deaths)} workers died within {_WITHIN:g} s, the last: {why}")
        return lost

    def _hear(self, pipe: Pipe, name: str) -> None:
        """What a worker says: that it has begun, or why it could not, which is raised."""
        said: list[object] = []
        with suppress(EOFError, OSError):
            while pipe.poll():
                said.append(pipe.recv())
        for each in said:
            if isinstance(each, ExceptionWrapper):
                each.reraise()
            self._begun.add(name)
            self._failed = self._killed = 0

    def _count_failure(self, exitcode: int, why: str) -> None:
        """A worker ended before it could begin: another would most likely do the same."""
        self._failed += exitcode >= 0
        self._killed += exitcode < 0
        if self._failed >= _NOT_BEGUN or self._killed >= _NOT_BEGUN_KILLED:
            raise RuntimeError(
                f"coordlfs: workers end before they can begin: {why}. What they printed says why; with "
                "multiprocessing_context='spawn' the dataset must be one that can be unpickled in another process"
            )

    def close(self) -> None:
        """End them, and wait until they have ended."""
        for _, pipe, _ in self._processes.values():
            with suppress(OSError):
                pipe.send("stop")
        deadline = time.monotonic() + _GOODBYE
        for process, pipe, _ in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
            pipe.close()
        self._processes.clear()
        self._filenos = ()
