"""What a hint costs: CPU time of who sends it and of the server together, for each file that is announced.

By ioctl, by the names of attributes, and file by file. All files are cached, so that nothing is read ahead, and their
numbers are known, as a sampler knows them from its second epoch on. What is left is sending, taking, and bookkeeping.
"""

from __future__ import annotations

import base64
import fcntl
import os
import random
import struct
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median

from coordlfs_tools.bench.report import Context, Figure, alternate
from coordlfs_tools.lab import mounts

from coordlfs.cache.hints import COMMAND, HEADER, MAGIC, MOST_IN_NAME

_FILES, _EPOCHS, _QUICK_EPOCHS = 2_000, 10, 2
_ROUNDS = 20
_CACHE = 64 << 20
_STEP, _WINDOW = 64, 512  # files after which more is announced, and how far ahead
_FIELDS = struct.Struct("<6Q")


def run(context: Context) -> list[Figure]:
    """Microseconds of CPU a file, by each way."""
    epochs = _QUICK_EPOCHS if context.quick else _EPOCHS
    with tempfile.TemporaryDirectory(dir=context.directory) as directory:
        for number in range(_FILES):
            (Path(directory) / f"{number}").write_bytes(b"%d" % number)
        with mounts.coordlfs(Path(directory), _CACHE) as mount:
            mount.warm()
            processes = mount.settled()["processes"]
            pids = [processes["server"], *processes["keepers"]]
            paths = [mount.point / f"{number}" for number in range(_FILES)]
            numbers = [os.stat(path).st_ino for path in paths]
            root = os.open(mount.point, os.O_RDONLY)
            ours: dict[str, list[float]] = {}

            def measured(name: str, send: Callable[[int], None], times: int) -> Callable[[int], float]:
                def measure(number: int) -> float:
                    own, theirs = time.process_time(), _cpu_of(pids)
                    for epoch in range(times):
                        send(number * times + epoch)
                    own = (time.process_time() - own) * 1e6 / times / _FILES
                    ours.setdefault(name, []).append(own)
                    return own + (_cpu_of(pids) - theirs) * 1e6 / times / _FILES

                return measure

            def order(send: Callable[[int, tuple[int, ...], array[int]], None]) -> Callable[[int], None]:
                return lambda epoch: _announce(epoch, numbers, lambda *hint: send(root, *hint))

            def one_by_one(_: int) -> None:
                for path in paths:
                    os.getxattr(path, "user.coordl.ahead")

            ways = {"an order, by ioctl": order(_by_ioctl), "an order, by names": order(_by_names)}
            try:
                sides = {name: measured(name, way, epochs) for name, way in ways.items()}
                sides["files one by one"] = measured("files one by one", one_by_one, 1)
                taken = alternate(context, context.rounds(_ROUNDS), sides)
            finally:
                os.close(root)
    return [
        Figure(
            f"µs of CPU a file: {name}",
            both,
            None,
            f"who sends {median(ours[name]):.2f}, server and keepers {median(both) - median(ours[name]):.2f}",
        )
        for name, both in taken.items()
    ]


def _announce(epoch: int, numbers: list[int], send: Callable[[tuple[int, ...], array[int]], None]) -> None:
    """One epoch, in a new order."""
    chosen = array("Q", random.Random(epoch).sample(numbers, len(numbers)))
    for start in range(0, len(chosen) + _WINDOW, _STEP):
        position, start = max(0, start - _WINDOW), min(start, len(chosen))
        send((1, 1, epoch, len(chosen), position, start), chosen[start : start + _STEP])


def _by_ioctl(root: int, fields: tuple[int, ...], numbers: array[int]) -> None:
    message = bytearray(HEADER.pack(MAGIC, len(numbers), *fields) + numbers.tobytes())
    fcntl.ioctl(root, COMMAND | len(message) << 16, message)


def _by_names(root: int, fields: tuple[int, ...], numbers: array[int]) -> None:
    *known, start = fields
    for first in range(0, max(1, len(numbers)), MOST_IN_NAME):
        message = _FIELDS.pack(*known, start + first) + numbers[first : first + MOST_IN_NAME].tobytes()
        text = base64.urlsafe_b64encode(message).decode().rstrip("=")
        os.getxattr(root, f"user.coordl.hint.1.{text}")


def _cpu_of(pids: list[int]) -> float:
    """Seconds of CPU that the threads of processes have taken, those that ended left out."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
