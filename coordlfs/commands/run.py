"""`coordlfs run`: one command with the mount around it, which the command alone sees and which ends with it.

Or with its dataset pinned as long as it runs. It puts `mount` or `pin`, `job` and `umount` together, and knows nothing
of how they do it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from coordlfs.commands import job, pinned
from coordlfs.commands.mount import Options, mount
from coordlfs.commands.mounted import find, stats
from coordlfs.commands.pin import end as end_pin
from coordlfs.commands.pin import pin
from coordlfs.commands.status import epochs_table, summary
from coordlfs.errors import UserError
from coordlfs.kernel import process
from coordlfs.processes import attachment, holders
from coordlfs.sources import address

_END_TIMEOUT = 30.0  # seconds that the mount's processes are waited for
_LOOK_EVERY = 1.0  # seconds between looks for who holds the mount


def run(source: str, mountpoint: str | None, command: list[str], options: Options, inherited: process.Inherited) -> int:
    """Run `command` with `source` mounted, seen by it alone; its exit status (128 + signal if killed).

    It is mounted in place, which a bucket has none of, unless there is a `mountpoint`.
    `inherited`: what the command is to be given, as if nobody had been in between.
    """
    if mountpoint is None and address.parse(source) is not None:
        raise UserError(
            f"{source} has no place of its own: say where to mount it, as `coordlfs run {source} MNT -- …`", 2
        )
    job.block_signals()
    _unshare()
    mountpoint = source if mountpoint is None else mountpoint
    mountpoint = os.path.realpath(mountpoint) if mountpoint else mountpoint  # the working directory is left below
    supervisor = mount(source, mountpoint, options, bound=True)
    job.block_all_signals()
    try:
        # The directory was entered before it was mounted over: enter it again.
        with suppress(OSError):
            os.chdir(os.getcwd())
        process.forbid_mounting()
        status = job.call(command, inherited)
        with suppress(UserError):
            report(stats(mountpoint))
        return status
    finally:
        os.chdir("/")  # or this process would be the one that holds the mount
        _end(mountpoint, supervisor)


def run_pinned(directory: str, command: list[str], options: Options, inherited: process.Inherited) -> int:
    """Run `command` while pages of `directory` are kept in memory; its exit status (128 + signal if killed)."""
    job.block_signals()
    directory = os.path.realpath(directory) if directory else directory
    supervisor = pin(directory, [], options, bound=True)
    job.block_all_signals()
    try:
        status = job.call(command, inherited)
        with suppress(UserError):
            print(summary(pinned.stats(directory)), file=sys.stderr)
        return status
    finally:
        end_pin(supervisor)


def _end(mountpoint: str, supervisor: subprocess.Popen[bytes]) -> None:
    """Unmount; what the command left running, with files of the mount open, keeps these, and is not waited for."""
    device = None
    with suppress(UserError):
        device = find(mountpoint).device
    supervisor.terminate()  # it unmounts wherever the mount is by now
    deadline = time.monotonic() + _END_TIMEOUT
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(_LOOK_EVERY)
            return
        if device is not None and holders.of_files(device):
            supervisor.returncode = 0  # it lives on: do not let Popen warn of it
            return


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


def report(figures: dict[str, Any]) -> None:
    """What a run read, on standard error."""
    print(summary(figures), file=sys.stderr)
    for line in epochs_table(figures):
        print(line, file=sys.stderr)
