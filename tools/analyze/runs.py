"""Runs the user's command with the hook in it, and ends all that it started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordlfs_tools.analyze.hook.coordlfs_stall_hook import ENVIRONMENT

from coordlfs.errors import UserError

_HOOK = Path(__file__).with_name("hook")
_GRACE = 10.0  # seconds that the command has to end by itself once it was asked to
_LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run left: a result for each process that had a loader, rank 0's first; the files it opened, each
    time that it did."""

    results: list[dict[str, Any]]
    opened: list[str]
    hooked: bool
    status: int
    seconds: float

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The processes whose loader was measured."""
        return [result for result in self.results if result.get("sections")]


def run(
    command: Sequence[str],
    sections: Sequence[dict[str, Any]] = (),
    *,
    data: Path | None = None,
    loader: int | None = None,
    opens: bool = False,
    show: bool = False,
) -> Ran:
    """Run `command` and measure `sections` in it (none: let it run as it is). Raises UserError if it fails."""
    with _directory() as out:
        config = {"out": str(out), "sections": list(sections), "loader": loader, "opens": opens}
        config["data"] = str(data) if data else None
        path = os.pathsep.join([str(_HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, ENVIRONMENT: json.dumps(config), "PYTHONPATH": path}
        output = out / "output"
        begin = time.monotonic()
        with output.open("wb") as log:
            status = _end_of(command, environment, None if show else log, out)
        seconds = time.monotonic() - begin
        if status:
            raise UserError(_failure(command, status, output))
        results = [json.loads(path.read_text()) for path in sorted(out.glob("result-*.json"))]
        results.sort(key=lambda result: int(result["rank"]))
        with suppress(FileNotFoundError):
            opened = (out / "opens").read_text(errors="surrogateescape").split("\n")[:-1]
            return Ran(results, opened, True, status, seconds)
        return Ran(results, [], (out / "started").exists(), status, seconds)


@contextmanager
def _directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="coordlfs-analyze-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _end_of(command: Sequence[str], environment: dict[str, str], log: Any, out: Path) -> int:
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as e:
        raise UserError(f"{command[0]} cannot be run: {e.strerror}", 2) from e
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        _kill_all(out)
        process.wait()


def _kill_all(out: Path) -> None:
    """Kill what the command started and that did not end with it; found by the environment we gave, and nobody else."""
    mark = f"{out}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with suppress(OSError):
                words = next((w for w in (entry / "environ").read_bytes().split(b"\0") if w.startswith(_MARK)), b"")
                if mark in words:
                    os.kill(int(entry.name), signal.SIGKILL)


_MARK = ENVIRONMENT.encode() + b"="


def _failure(command: Sequence[str], status: int, output: Path) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = output.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    said = "; it said at last:\n  " + "\n  ".join(lines) if lines else " and said nothing"
    return f"the command {how}: {' '.join(command)}{said}"
