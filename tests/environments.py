"""Other people's machines, as tests start commands on them: what a process is given by who starts it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Limits that root cannot raise.
WEAK = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource"]


@dataclass(frozen=True)
class Environment:
    """How a command is started. `variables`: None is one that is not set. `prepare` is called in the new process."""

    variables: dict[str, str | None] = field(default_factory=dict)
    prepare: Callable[[], object] | None = None
    closed: tuple[int, ...] = ()
    directory: str | None = None
    before: tuple[str, ...] = ()


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)


def _be_unusual() -> None:
    _block_signals()
    os.umask(0o777)
    os.nice(19)


def limit(kind: int, soft: int, hard: int | None = None) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1] if hard is None else hard))


def leave_directory() -> None:
    os.mkdir(gone := f"/var/tmp/coordlfs-gone-{os.getpid()}")
    os.chdir(gone)
    os.rmdir(gone)


_PYTHON: dict[str, str | None] = {
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
    "PYTHONINSPECT": "1",
    "PYTHONIOENCODING": "ascii:strict",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "LC_ALL": "C",
}
ENVIRONMENTS = {
    "foreign modules": Environment({"PYTHONPATH": "{foreign}"}),
    "foreign directory": Environment(directory="{foreign}"),
    "Python variables": Environment(_PYTHON),
    "no variables": Environment({"HOME": None, "PATH": None, "LANG": None, "TMPDIR": "/" + "x" * 300}),
    "no directory": Environment(prepare=leave_directory),
    "signals": Environment(prepare=_block_signals),
    "umask and niceness": Environment(prepare=lambda: (os.umask(0o777), os.nice(19))),
    "no descriptors": Environment(closed=(0, 1, 2)),
    "no input": Environment(closed=(0,)),
    "no output": Environment(closed=(1,)),
    "no errors": Environment(closed=(2,)),
    "soft limits": Environment(
        prepare=lambda: [
            limit(kind, soft)()
            for kind, soft in (
                (resource.RLIMIT_FSIZE, 0),
                (resource.RLIMIT_NOFILE, 16),
                (resource.RLIMIT_STACK, 1 << 18),
                (resource.RLIMIT_CPU, 1),
            )
        ]
    ),
    "hard limits": Environment(
        prepare=lambda: [
            limit(kind, hard, hard)()
            for kind, hard in (
                (resource.RLIMIT_FSIZE, 20 << 20),
                (resource.RLIMIT_AS, 1 << 30),
                (resource.RLIMIT_NOFILE, 64),
            )
        ],
        before=tuple(WEAK),
    ),
    "other processes hidden": Environment(
        before=("unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh")
    ),
    "no /dev/shm": Environment(before=("unshare", "-m", "sh", "-c", 'umount -l /dev/shm 2>/dev/null; exec "$@"', "sh")),
    "all at once": Environment(
        {**_PYTHON, "HOME": None, "LANG": None, "TMPDIR": "/" + "x" * 300},
        prepare=_be_unusual,
        closed=(0, 1, 2),
        directory="{foreign}",
        before=("unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh"),
    ),
}


def start(where: Environment, foreign: Path, *command: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment; `foreign` is a directory of modules of another program."""

    def prepare() -> None:
        if where.prepare is not None:
            where.prepare()
        for fd in where.closed:
            os.close(fd)

    variables = dict(os.environ)
    for name, value in where.variables.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value.format(foreign=foreign)
    return subprocess.run(
        [*where.before, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=variables,
        cwd=where.directory.format(foreign=foreign) if where.directory else None,
        preexec_fn=prepare,
    )
