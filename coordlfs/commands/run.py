"""`coordlfs run`: one command with the mount around it, which the command alone sees and which ends with it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from coordlfs.commands.mount import Options, mount
from coordlfs.commands.mounted import stats
from coordlfs.commands.status import epochs_table, summary
from coordlfs.commands.umount import umount
from coordlfs.errors import UserError
from coordlfs.kernel import process
from coordlfs.processes import attachment

_END_TIMEOUT = 30.0


def run(source: str, command: list[str], options: Options) -> int:
    """Run `command` with `source` mounted in place, seen by it alone; its exit status (128 + signal if killed)."""
    _unshare()
    supervisor = mount(source, source, options, bound=True)
    try:
        # The directory was entered before it was mounted over: enter it again.
        with suppress(OSError):
            os.chdir(os.getcwd())
        status = _call(command)
        with suppress(UserError):
            report(stats(source))
        return status
    finally:
        os.chdir("/")  # or this process would be the one that holds the mount
        with suppress(UserError):
            umount(source, lazy=True)
        try:
            supervisor.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            supervisor.terminate()


def _unshare() -> None:
    """Give this process a mount namespace of its own: without root, in a user namespace of its own."""
    try:
        if attachment.is_privileged():
            process.unshare_mounts()
        else:
            process.unshare_user()
    except OSError as e:
        raise UserError(
            f"a mount that only the command sees needs a namespace, which cannot be made ({e.strerror}):"
            " run as root, or `coordlfs mount` before the command and `coordlfs umount` after it"
        ) from None


def _call(command: list[str]) -> int:
    """Run a command and pass signals on to it; its exit status."""
    process.forbid_mounting()
    early: list[int] = []  # signals that came before there was anybody to pass them on to
    pass_on: Callable[[int], object] = early.append
    ways: dict[int, Callable[[int, object], object]] = {
        signal.SIGINT: lambda *_: None,  # a terminal sends it to the child as well
        signal.SIGTERM: lambda number, _: pass_on(number),
        signal.SIGHUP: lambda number, _: pass_on(number),
    }
    for number, way in ways.items():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup: the command is to ignore it, too
            signal.signal(number, way)
    try:
        child = subprocess.Popen(command)
    except OSError as e:
        # EACCES may be of a directory of PATH only.
        absent = e.errno == errno.ENOENT or ("/" not in command[0] and shutil.which(command[0]) is None)
        why = os.strerror(errno.ENOENT) if absent else e.strerror
        raise UserError(f"{command[0]} cannot be run: {why}", 127 if absent else 126) from None
    pass_on = child.send_signal
    for number in early:
        pass_on(number)
    status = child.wait()
    return status if status >= 0 else 128 - status


def report(figures: dict[str, Any]) -> None:
    """What a run read, on standard error."""
    print(summary(figures), file=sys.stderr)
    for line in epochs_table(figures):
        print(line, file=sys.stderr)
