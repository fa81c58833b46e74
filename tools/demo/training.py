"""Runs the training script `train.py` as a job in a cgroup, and notes of each epoch what it took."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from coordlfs_tools.lab.cgroups import Cgroup
from coordlfs_tools.lab.errors import LabError

SCRIPT = Path(__file__).with_name("train.py")
EPOCHS = 3
_LIMIT = 600.0  # seconds that a training may take; a mount that hangs must not hang the demo
_EPOCH = re.compile(r"epoch \d+: ([\d.]+) s, (\d+) images/s")


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen from outside: bytes read from the disk so far, and the hit rate of the epoch that just ended."""

    disk_bytes: int
    hit_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch. `disk_bytes` are those that were read from the disk."""

    seconds: float
    files_per_second: int
    disk_bytes: int
    hit_rate: float | None


def run(data: Path, job: Cgroup | None, observe: Callable[[], Observed], epochs: int = EPOCHS) -> list[Epoch]:
    """Train on `data` as a job in the cgroup; what the script prints is shown. Raises LabError if it fails."""
    command = [sys.executable, str(SCRIPT), str(data), "--epochs", str(epochs)]
    done: list[Epoch] = []
    # A session of its own, so that the script and its workers can be ended together, and Ctrl-C is ours alone.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=job.enter if job else None
    ) as process:
        timer = Timer(_LIMIT, _kill, [process])
        timer.start()
        try:
            assert process.stdout
            before = Observed(0)
            for line in process.stdout:  # the first says that the script is loaded and has listed the files
                now = observe()
                print(f"  {line.rstrip()}", flush=True)
                if match := _EPOCH.match(line):
                    read = now.disk_bytes - before.disk_bytes
                    done.append(Epoch(float(match[1]), int(match[2]), read, now.hit_rate))
                before = now
        finally:
            timer.cancel()
            if process.poll() is None and len(done) < epochs:
                _kill(process)
    if process.returncode:
        raise LabError(f"the training script ended with status {process.returncode}")
    return done


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
