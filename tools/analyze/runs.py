"""Runs the user's command with the hook in it, and ends all that it started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordlfs_tools.analyze.hook.coordlfs_stall_hook import held
from coordlfs_tools.analyze.hook.coordlfs_stall_hook import opens as opens_
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import ENVIRONMENT, Config, Section

from coordlfs.errors import UserError
from coordlfs.kernel.process import end_with_parent

Tick = Callable[[], None]

_HOOK = Path(__file__).with_name("hook")
_TICK = 0.2  # seconds between two looks at the clock
_GRACE = 5.0  # seconds that the command has to end by itself after each signal
_LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run left: a result for each process that had a loader, rank 0's first; the files it opened, each
    time that it did; whether a Python with the hook in it was started at all."""

    results: list[dict[str, Any]]
    opened: list[str]
    held: set[str]
    hooked: bool
    seconds: float

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The processes whose loader was measured."""
        return [result for result in self.results if result.get("sections")]


def run(
    command: Sequence[str],
    sections: Sequence[Section] = (),
    *,
    data: Path | None = None,
    loader: int | None = None,
    opens: bool = False,
    show: bool = False,
    prepare: Callable[[], None] | None = None,
    tick: Tick = lambda: None,
) -> Ran:
    """Run `command` and measure `sections` in it (none: let it run as it is). Raises UserError if it fails.

    `show`: what it prints is shown, not kept. `prepare` is called in the process before it becomes the command, `tick`
    several times a second.
    """
    with _directory() as out:
        config = Config(str(out), tuple(sections), loader, opens, str(data) if data else None)
        path = os.pathsep.join([str(_HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, ENVIRONMENT: config.dumps(), "PYTHONPATH": path}
        output = out / "output"
        begin = time.monotonic()
        watch = _Watch(out, str(data) if data else None) if opens else None

        def look() -> None:
            tick()
            if watch:
                watch.look()

        with output.open("wb") as log:
            status = _status(command, environment, None if show else log, out, prepare, look)
        seconds = time.monotonic() - begin
        results = [json.loads(path.read_text()) for path in sorted(out.glob("result-*.json"))]
        results.sort(key=lambda result: int(result["rank"]))
        mapped = watch.found(results) if watch else set()
        ran = Ran(results, _opened(out / "opens"), mapped, (out / "started").exists(), seconds)
        # What fails after everything was measured fails because the measured processes ended in the midst of it.
        if status and not _complete(ran, sections):
            raise _failure(command, status, output)
        return ran


class _Watch:
    """Looks from time to time at which files the command's processes have open or mapped."""

    def __init__(self, out: Path, data: str | None) -> None:
        self._out = out
        self._inside = os.path.join(data, "") if data else None
        self._held: set[str] = set()

    def look(self) -> None:
        for pid in _ours(self._out):
            self._held |= held.held(pid)

    def found(self, results: Sequence[dict[str, Any]]) -> set[str]:
        """What was seen, with what the processes say that they had at their end, and could be data."""
        paths = self._held.union(*(result["held"] for result in results))
        packages = tuple({package for result in results for package in result["packages"]})
        if self._inside:
            return {path for path in paths if path.startswith(self._inside)}
        ours = (os.path.join(os.path.realpath(self._out), ""), *packages)
        return {path for path in paths if opens_.could_be_data(path) and not path.startswith(ours)}


def _complete(ran: Ran, sections: Sequence[Section]) -> bool:
    wanted = {section.name for section in sections}
    return bool(ran.measured) and all(wanted <= result["sections"].keys() for result in ran.measured)


def _opened(log: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [os.fsdecode(path) for path in log.read_bytes().split(b"\0")[:-1]]
    return []


@contextmanager
def _directory() -> Iterator[Path]:
    # Short, for sockets of the command's lie in it: no longer than multiprocessing's own.
    path = Path(tempfile.mkdtemp(prefix="cl-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _status(
    command: Sequence[str],
    environment: dict[str, str],
    log: Any,
    out: Path,
    prepare: Callable[[], None] | None,
    tick: Tick,
) -> int:
    ours = os.getpid()

    def before() -> None:
        end_with_parent(ours, signal.SIGTERM)  # even if we are killed
        if prepare:
            prepare()

    try:
        # A session of its own, so that Ctrl-C comes to us alone, and all that it started can be told to end.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=before,
        )
    except OSError as e:
        raise UserError(f"{command[0]} cannot be run: {e.strerror}", 2) from e
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_TICK)
            tick()
    finally:
        try:
            _ask_to_end(process)
        finally:
            _kill_all(out)
            process.wait()


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """As a terminal would, then as an init would: a program that cleans up after itself shall do so."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, asked)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def _kill_all(out: Path) -> None:
    """Kill what the command started and that did not end with it, until there is nothing left."""
    deadline = time.monotonic() + _GRACE
    while (left := _ours(out)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _ours(out: Path) -> list[int]:
    """The processes that run with what we put into the environment; nobody else's."""
    mark, place = f"{ENVIRONMENT}=".encode(), os.fsencode(out)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if any(word.startswith(mark) and place in word for word in words):
                    found.append(int(entry.name))
    return found


def _failure(command: Sequence[str], status: int, output: Path) -> UserError:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = output.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    said = "; it said at last:" if lines else " and said nothing"
    return UserError(f"the command {how}: {' '.join(command)}{said}", output=lines)
