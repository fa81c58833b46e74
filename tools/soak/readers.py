"""The readers of a soak: processes that read every file of every epoch, in one way or another, and judge what they got.

`python -m coordlfs_tools.soak.readers JSON`, started by `run.py`; what is wrong is printed, a line each, and counted.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from coordlfs_tools.soak.dataset import Fate, fate, name
from coordlfs_tools.soak.ledger import ABSENT, Ledger
from coordlfs_tools.soak.verdict import ALL, Piece, origins, wrong

_TOLD = 20  # of what is wrong, so many are told in full by each reader
_LOG_LINES = 200  # of a mount's log, kept with a read that went wrong
_DIRECT = 1 << 20
_LATER = 0.02  # seconds between attempts to open a file that is being changed


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one reader. `fails`: its mount's source fails at times. `loader`: a torch DataLoader with so many workers."""

    point: str
    ledger: str
    files: int
    readers: int
    index: int
    seed: int
    fails: bool
    hang: float
    loader: int
    log: str  # of the mount
    kept: str  # a file that takes what there is to know of a read that went wrong


# -- ways to read a file: all of it, or pieces ------------------------------------------------------------------------


def _whole(fd: int, random: Random) -> list[Piece]:
    size, parts = random.choice([4096, 1 << 16, 1 << 20]), []
    while part := os.read(fd, size):
        parts.append(part)
    return [Piece(0, ALL, b"".join(parts))]


def _pread(fd: int, asked: int, offset: int) -> bytes:
    """As much as is asked for, or up to the end of the file.

    A call that meets an error part of the way gives what came before, as that of any file does: the next one says so.
    """
    data = b""
    while len(data) < asked and (more := os.pread(fd, asked - len(data), offset + len(data))):
        data += more
    return data


def _here_and_there(fd: int, random: Random) -> list[Piece]:
    size = os.fstat(fd).st_size
    pieces = []
    for _ in range(6):
        offset, asked = random.randrange(size + 1), random.randrange(1, 1 << 16)
        pieces.append(Piece(offset, asked, _pread(fd, asked, offset)))
    return pieces


def _backwards(fd: int, random: Random) -> list[Piece]:
    step = random.randrange(1000, 1 << 19)
    offsets = range(0, os.fstat(fd).st_size, step)
    return [Piece(offset, step, _pread(fd, step, offset)) for offset in reversed(offsets)]


def _mapped(fd: int, random: Random) -> list[Piece]:
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
        return [Piece(0, ALL, mapping[:])]


def _sent(fd: int, random: Random) -> list[Piece]:
    to = os.memfd_create("soak")
    try:
        while os.sendfile(to, fd, None, 1 << 20):
            pass
        size = os.lseek(to, 0, os.SEEK_END)
        return [Piece(0, ALL, os.pread(to, size, 0))]
    finally:
        os.close(to)


def _direct(fd: int, random: Random) -> list[Piece]:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _DIRECT) as into:
            data = b""
            while n := os.preadv(again, [into], len(data)):
                data += into[:n]
            return [Piece(0, ALL, data)]
    finally:
        os.close(again)


_Way = Callable[[int, Random], list[Piece]]
_WAYS: list[_Way] = [_whole, _whole, _whole, _here_and_there, _backwards, _mapped, _sent, _direct]


class Reader:
    """One thread of reading, with its own entry in the ledger."""

    def __init__(self, settings: Settings, worker: int = 0) -> None:
        self._settings = settings
        self._random = Random(f"reader {settings.seed} {settings.index} {worker}")
        self.ledger = Ledger(Path(settings.ledger), settings.files, settings.readers)
        self._mine: Any = self.ledger.reader(settings.index + worker)
        self._worker = worker

    def epoch(self) -> None:
        """Read every file once."""
        order = list(range(self._settings.files))
        self._random.shuffle(order)
        for file in order:
            if self.ledger.stopped:
                return
            self.read(file)
        self._mine["epochs"] += 1

    def read(self, file: int) -> int:
        """Read and judge one file; how many bytes it had."""
        began = time.monotonic()
        self._mine["file"], self._mine["since"] = file, began
        try:
            return self._read(file, began)
        finally:
            self._mine["since"] = 0
            self._mine["longest"] = max(float(self._mine["longest"]), time.monotonic() - began)

    def _read(self, file: int, began: float) -> int:
        # Under a mapping an error is SIGBUS, which the directory itself would send as well.
        ways = (
            _WAYS if fate(file) is Fate.STEADY and not self._settings.fails else [w for w in _WAYS if w is not _mapped]
        )
        way = self._random.choice(ways)
        while True:
            since = time.monotonic()
            try:
                fd = os.open(f"{self._settings.point}/{name(file)}", os.O_RDONLY)
                try:
                    opened = os.fstat(fd)
                    pieces = way(fd, self._random)
                finally:
                    os.close(fd)
            except OSError as e:
                legal = self.ledger.legal(file, since, time.monotonic())
                absent = any(v.size == ABSENT for v in legal)
                made = self._settings.fails and self.ledger.may_fail(file, e.errno or 0, since, time.monotonic())
                if made or (e.errno == errno.ENOENT and absent):
                    self._mine["expected"] += 1
                    return 0
                if e.errno == errno.ESTALE and len(legal) > 1 and time.monotonic() < began + self._settings.hang:
                    self._mine["expected"] += 1  # whoever opens it again is to get the new one
                    time.sleep(_LATER)
                    continue
                self._fail("errors", file, way, f"{e.strerror} ({errno.errorcode.get(e.errno or 0)}); legal: {legal}")
                return 0
            break
        legal = self.ledger.legal(file, since, time.monotonic())
        if problem := wrong(file, pieces, legal):
            self._fail("wrong", file, way, problem)
            self._keep(file, way, since, opened, pieces)
        nbytes = sum(len(piece.data) for piece in pieces)
        self._mine["files"] += 1
        self._mine["bytes"] += nbytes
        return nbytes

    def _fail(self, what: str, file: int, way: _Way, text: str) -> None:
        self._mine[what] += 1
        if self._mine["wrong"] + self._mine["errors"] <= _TOLD:
            who = f"reader {self._settings.index + self._worker} of {self._settings.point}"
            print(f"{what}: {who}, file {name(file)} ({fate(file).value}), {way.__name__[1:]}: {text}", flush=True)

    def _keep(self, file: int, way: _Way, since: float, opened: os.stat_result, pieces: list[Piece]) -> None:
        """Write down what a wrong read got, and what is to be known of the file and its mount now."""
        now, point = time.monotonic(), Path(self._settings.point)
        newest = self.ledger.newest(file).generation
        told: dict[str, Any] = {
            "mount": str(point),
            "file": name(file),
            "fate": fate(file).value,
            "way": way.__name__[1:],
            "opened": since,
            "judged": now,
            "when opened": _attributes(opened),
            "versions": self.ledger.history(file),
            "got": [{"offset": p.offset, "asked": p.asked, "pages of": origins(file, p, newest)} for p in pieces],
        }
        with suppress(OSError):
            told["now"] = _attributes(os.stat(point / name(file)))
            told["cached"] = os.getxattr(point / name(file), "user.coordl.cached").decode()
        with suppress(OSError):
            told["stats"] = json.loads(os.getxattr(point, "user.coordl.stats"))
        told["log"] = Path(self._settings.log).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        with open(self._settings.kept, "a") as f:
            f.write(json.dumps(told) + "\n")


def _attributes(st: os.stat_result) -> dict[str, int]:
    return {"inode": st.st_ino, "size": st.st_size, "mtime_ns": st.st_mtime_ns, "ctime_ns": st.st_ctime_ns}


# -- the same through torch -------------------------------------------------------------------------------------------


class _Files:
    """A map-style dataset: the length of a file, read and judged by the worker's own reader."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reader: Reader | None = None

    def __len__(self) -> int:
        return self._settings.files

    def __getitem__(self, file: int) -> int:
        if self._reader is None:
            from torch.utils.data import get_worker_info

            worker = get_worker_info()
            assert worker is not None
            self._reader = Reader(self._settings, worker.id)
        return 0 if self._reader.ledger.stopped else self._reader.read(file)


def _load(settings: Settings) -> None:
    from torch.utils.data import DataLoader

    reader = Reader(settings)
    loader: Any = DataLoader(
        _Files(settings),  # type: ignore[arg-type]
        batch_size=16,
        shuffle=True,
        num_workers=settings.loader,
        persistent_workers=True,
    )
    mine: Any = reader.ledger.reader(settings.index + settings.loader)  # an entry for epochs, beside the workers'
    while not reader.ledger.stopped:
        for _ in loader:
            pass
        mine["epochs"] += 1


def main() -> None:
    """Read until the ledger says stop."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.loader:
        _load(settings)
        return
    reader = Reader(settings)
    while not reader.ledger.stopped:
        reader.epoch()


if __name__ == "__main__":
    main()
