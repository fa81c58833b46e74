"""What `mount` and `pin` have in common: checks beforehand, a supervisor that is started, and staying with it.

It does not know what the supervisor does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from coordlfs.commands.status import summary
from coordlfs.errors import UserError
from coordlfs.kernel import limits, process, systemd
from coordlfs.processes import interpreter

COMPILED = (  # modules, as in pyproject.toml
    "coordlfs.catalogue.records",
    "coordlfs.disk.slots",
    "coordlfs.disk.stock",
    "coordlfs.serving.entries",
    "coordlfs.serving.fast_path",
    "coordlfs.serving.plain_path",
)
_START_TIMEOUT = 60.0
_TELL_STATUS = 30.0  # seconds between what the service manager is told


def check_source(source: str) -> int:
    """A descriptor of the dataset's directory. Raises UserError."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: give the dataset's directory") from None
    except NotADirectoryError:
        raise UserError(f"{source} is not a directory: give the directory that holds the dataset") from None
    except PermissionError:
        raise UserError(f"{source} may not be read by this user: do it as one who may") from None
    except OSError as e:
        raise UserError(f"{source} cannot be opened: {e.strerror}") from None
    return fd


def check_log(log_file: str | None) -> None:
    """Raises UserError if messages cannot be written there."""
    if log_file is None:
        return
    try:
        open(log_file, "a").close()
    except OSError as e:
        raise UserError(f"--log-file {log_file} cannot be written: {e.strerror}") from None


def check_limits() -> None:
    """Raises UserError if a limit is so tight that nothing would work."""
    if limit := limits.too_tight():
        raise UserError(f"{limit.name} allows {limit.found}, and {limit.cost}: {limit.remedy}")


def check_compiled() -> None:
    """Raises UserError if coordlfs was not compiled for this Python."""
    missing = [name for name in COMPILED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not compiled for this Python ({sys.version_info[0]}.{sys.version_info[1]}): "
            "install coordlfs again, with a C compiler (`pip install`, or `sh tools/setup.sh` in a checkout)"
        )


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit, so that they end this process once it has cleaned up."""
    ended: list[int] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        if len(ended) == 1:  # the others do not disturb it
            raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ended:
            os.kill(os.getpid(), ended[0])


def start(
    module: str, config: dict[str, Any], fds: list[int], *, foreground: bool
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a supervisor, with the descriptors `fds` that are in `config`; from where it will report."""
    report_in, report_out = os.pipe2(os.O_CLOEXEC)
    quiet = None if foreground else subprocess.DEVNULL
    supervisor = subprocess.Popen(
        [*interpreter.command(module), json.dumps(config | {"report": report_out})],
        pass_fds=[report_out, *fds],
        stdin=subprocess.DEVNULL,
        cwd="/",
        stdout=quiet,
        stderr=quiet,
    )  # in our process group: while an automounter waits for the mount, it lets no other one see the mountpoint
    os.close(report_out)
    return supervisor, report_in


def await_ready(report_in: int, explain: Callable[[dict[str, Any]], UserError]) -> None:
    """Wait until the supervisor serves. Raises what `explain` makes of a report that it does not."""
    try:
        ready = process.is_readable(report_in, _START_TIMEOUT)
        report = os.read(report_in, 1 << 16) if ready else b""
        failure = json.loads(report) if report else {"error": "its processes ended before they could say why"}
        if not failure.get("ready"):
            raise explain(failure)
    finally:
        os.close(report_in)


def leave(supervisor: subprocess.Popen[bytes]) -> int:
    """Let a supervisor live on without this process, whose exit status it gives."""
    supervisor.returncode = 0  # do not let Popen warn of it
    return 0


def stay(
    supervisor: subprocess.Popen[bytes], figures: Callable[[], dict[str, Any]], *, serves: str, ends: str, ended: str
) -> int:
    """Remain in the foreground until the supervisor ends; SIGINT and SIGTERM end it. Its status.

    Where a service manager started this process, it is told how it goes: by `figures`, and in the words given.
    """

    def end(*_: object) -> None:
        systemd.notify(STOPPING=1, STATUS=ends)
        supervisor.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    if systemd.notify(READY=1, STATUS=serves):
        # A thread, since a mount whose server is being replaced does not answer, and signals must be heard meanwhile.
        threading.Thread(target=_tell_status, args=(figures,), name="status", daemon=True).start()
    status = supervisor.wait()
    systemd.notify(STOPPING=1, STATUS=ended)
    return status


def _tell_status(figures: Callable[[], dict[str, Any]]) -> None:
    while True:
        with suppress(UserError):
            systemd.notify(STATUS=summary(figures()))
        time.sleep(_TELL_STATUS)
