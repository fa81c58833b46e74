"""Reading a dataset as a training job does, measured: the C program `reader.c`, compiled when it is first needed."""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from coordlfs_tools.lab.cgroups import Cgroup
from coordlfs_tools.lab.errors import LabError

_LIMIT = 900.0  # seconds; a mount that hangs must not hang the benchmark


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over the files was: bytes read, and the seconds it took."""

    files: int
    bytes: int
    seconds: float

    @property
    def files_per_second(self) -> float:
        """Files per second."""
        return self.files / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


@cache
def _program() -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        raise LabError("there is no C compiler: install one (`apt-get install gcc`)")
    directory = tempfile.mkdtemp(prefix="coordlfs-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = f"{directory}/reader"
    source = Path(__file__).with_name("reader.c")
    subprocess.run([compiler, "-O2", "-pthread", str(source), "-o", program], check=True)
    return program


def read(
    root: Path, paths: Sequence[str], threads: int, seed: int, group: Cgroup | None = None, *, direct: bool = False
) -> Reading:
    """Read the files `paths` below `root`, each once, in the order that `seed` gives, from within `group`.

    `direct`: with O_DIRECT. Raises LabError if a file cannot be read, or the whole takes a quarter of an hour.
    """
    try:
        done = subprocess.run(
            [_program(), str(threads), str(seed), str(root), *(["direct"] if direct else [])],
            input="\n".join(paths),
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            preexec_fn=group.enter if group else None,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"reading {root} did not end within {_LIMIT:.0f} s") from None
    if done.returncode:
        raise LabError(f"reading {root} failed: {done.stderr.strip() or f'status {done.returncode}'}")
    return Reading(**json.loads(done.stdout))
