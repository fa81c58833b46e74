"""Training jobs of one node as processes: started together, listened to, killed, and ended with all that they started.

The CPU time that they take is read from /proc, of them and of everything they started, a daemon as well: this process
makes itself the one that inherits orphans, so nobody gets out of its sight, or is left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import Condition, Event, Thread
from typing import IO, Any

import numpy as np
from coordlfs_tools.lab import processes
from coordlfs_tools.lab.errors import LabError

_PR_SET_CHILD_SUBREAPER = 36
_SAMPLE = 0.2  # seconds between two looks at the CPU time
_ENDING = 20.0  # seconds that what was killed is given to be gone
_TICK = os.sysconf("SC_CLK_TCK")

Message = dict[str, Any]


class Job:
    """One process that runs a module; what it prints, a JSON object a line, is kept as messages."""

    def __init__(self, module: str, spec: Mapping[str, Any], errors: IO[str], sockets: str) -> None:
        self.messages: list[Message] = []
        self._errors = errors
        self._news = Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is ours alone
            env={**os.environ, "OMP_NUM_THREADS": "1", "COORDLFS_RUNTIME_DIR": sockets},
        )
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue  # what a library prints
            with self._news:
                self.messages.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self.messages.append({"event": "ended"})
            self._news.notify_all()

    def say(self, word: str) -> None:
        """Send a line to the process; nothing happens if it has ended."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def wait(self, event: str, limit: float) -> Message:
        """The first message with this event. Raises LabError if it does not come within `limit` seconds."""
        return self.wait_until(lambda messages: next((m for m in messages if m["event"] == event), None), limit, event)

    def wait_until(self, found: Callable[[Sequence[Message]], Message | None], limit: float, what: str) -> Message:
        """The message that `found` chooses from all so far. Raises LabError if none comes within `limit` seconds."""
        deadline = time.monotonic() + limit
        with self._news:
            while (message := found(self.messages)) is None:
                ended = bool(self.messages) and self.messages[-1]["event"] == "ended"
                left = deadline - time.monotonic()
                if ended or left <= 0:
                    how = "a job ended" if ended else f"a job took more than {limit:.0f} s"
                    raise LabError(f"{how} before it said {what!r}: {self._last_words()}")
                self._news.wait(left)
            return message

    def kill(self) -> None:
        """SIGKILL to this process alone; what it started is not told."""
        self._process.kill()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """Reap the process, which must have been killed or have ended."""
        assert self._process.stdin
        self._process.wait()
        self._listener.join()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        assert self._process.stdout
        self._process.stdout.close()


class Node:
    """The jobs of one run, and everything that they started."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        # Who is killed leaves its socket behind.
        self._sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="coordlfs-bench-"))
        self._others = set(_children(os.getpid()))
        self.jobs: list[Job] = []

    def start(self, module: str, spec: Mapping[str, Any]) -> Job:
        """Start a job. It waits for a word from us, if the module so wants."""
        errors = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        job = Job(module, spec, errors, self._sockets)
        self.jobs.append(job)
        return job

    def pids(self) -> set[int]:
        """All processes of the run, as /proc shows them now."""
        parents = processes.parents()
        ours = set(_children(os.getpid(), parents)) - self._others
        return ours.union(*(_descendants(pid, parents) for pid in ours))

    def below(self, pid: int) -> set[int]:
        """The processes that a process started, and those that these started."""
        return _descendants(pid, processes.parents())

    def cpu_seconds(self) -> float:
        """Seconds of CPU that the run's processes have taken so far, those that ended included."""
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        return reaped.ru_utime + reaped.ru_stime + sum(map(_cpu_of, self.pids()))

    def end(self) -> None:
        """Kill all processes of the run and reap them. Raises LabError if one stays."""
        deadline = time.monotonic() + _ENDING
        own = {job.pid for job in self.jobs}
        while pids := {pid for pid in self.pids() if pid not in own or processes.is_alive(pid)}:
            if time.monotonic() > deadline:
                raise LabError(f"processes {sorted(pids)} cannot be killed")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in set(_children(os.getpid())) - self._others - own:  # orphans that came to us
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)
        for job in self.jobs:
            job.close()


@contextmanager
def node() -> Iterator[Node]:
    """A place to run jobs in; in the end nothing that they started is left."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise LabError(f"prctl: {os.strerror(ctypes.get_errno())}")
    with ExitStack() as stack:
        result = Node(stack)
        stack.callback(libc.prctl, _PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        stack.callback(result.end)
        yield result


class CpuClock:
    """What the jobs' CPU time was at any moment while the `with` lasts."""

    def __init__(self, of: Node) -> None:
        self._node = of
        self._times: list[float] = []
        self._seconds: list[float] = []
        self._ended = Event()
        self._thread = Thread(target=self._watch)

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE):
            self._look()

    def _look(self) -> None:
        self._seconds.append(self._node.cpu_seconds())
        self._times.append(time.monotonic())

    def between(self, start: float, end: float) -> float:
        """Seconds of CPU between two moments of `time.monotonic`, interpolated."""
        before, after = np.interp([start, end], self._times, self._seconds)
        return float(after - before)


def _cpu_of(pid: int) -> float:
    """Seconds of CPU of a process and of those of its children that it has reaped."""
    return sum(map(int, processes.stat(pid)[11:15])) / _TICK


def _descendants(pid: int, parents: Mapping[int, int]) -> set[int]:
    found, new = set(), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new and child not in found]
        found.update(new)
    return found


def _children(parent: int, parents: Mapping[int, int] | None = None) -> list[int]:
    return [pid for pid, of in (parents or processes.parents()).items() if of == parent]
