"""What readers and faults share, in a file that all of them map: which versions were legal when, and what was seen.

Times are of the monotonic clock, which all processes of a machine share. A change is announced here before it is made,
and its predecessor given up only when the mounts have been made to notice: a reader that looks after it has read finds
every version that it may have got. Each entry has one writer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_ROWS = 32  # versions of one file that are remembered; more than can come to pass while one read takes
_FOREVER = float("inf")
ABSENT = -1  # the size of a file that is not there
ANY = (1 << 32) - 1  # instead of an errno

_ROW = np.dtype([("generation", "u8"), ("size", "i8"), ("born", "f8"), ("ended", "f8")])
_FILE = np.dtype([("rows", "u8"), ("row", _ROW, (_ROWS,)), ("errno", "u8"), ("fails", "f8"), ("mended", "f8")])
_READER = np.dtype(
    [("since", "f8"), ("file", "u8")]
    + [(name, "u8") for name in ("files", "bytes", "epochs", "wrong", "errors", "expected")]
    + [("longest", "f8")]
)
_HEAD = 8  # bytes: not zero when the readers are to stop


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a file; `size` is ABSENT where there is none."""

    generation: int
    size: int


class Ledger:
    """`files` and `readers` of one soak, mapped from `path`."""

    def __init__(self, path: Path, files: int, readers: int) -> None:
        at = _HEAD + files * _FILE.itemsize
        length = at + readers * _READER.itemsize
        if not path.exists():
            path.write_bytes(bytes(length))
        memory = np.memmap(path, np.uint8, "r+", shape=(length,))
        self._stop = memory[:_HEAD]
        self._files: Any = memory[_HEAD:at].view(_FILE)
        self._readers: Any = memory[at:].view(_READER)

    def stop(self) -> None:
        """Tell the readers to end."""
        self._stop[0] = 1

    @property
    def stopped(self) -> bool:
        """Whether they are to."""
        return bool(self._stop[0])

    # -- versions, written by who changes the source ------------------------------------------------------------

    def newest(self, file: int) -> Version:
        """The version that a file has now."""
        row = self._row(file, int(self._files["rows"][file]) - 1)
        return Version(int(row["generation"]), int(row["size"]))

    def announce(self, file: int, version: Version) -> None:
        """From now on a reader may get `version`, beside those that it might get before."""
        number = int(self._files["rows"][file])
        row = self._row(file, number)
        row["generation"], row["size"] = version.generation, version.size
        row["born"], row["ended"] = time.monotonic(), _FOREVER
        self._files["rows"][file] = number + 1  # only now can it be found

    def settle(self, file: int, after: float) -> None:
        """In `after` seconds a reader may no longer get any version but the newest."""
        number = int(self._files["rows"][file])
        for earlier in range(max(0, number - _ROWS), number - 1):
            row = self._row(file, earlier)
            if row["ended"] == _FOREVER:
                row["ended"] = time.monotonic() + after

    def legal(self, file: int, since: float, until: float) -> list[Version]:
        """The versions that a read between these times may have got, each once, the newest first."""
        number = int(self._files["rows"][file])
        found = []
        for at in range(number - 1, max(-1, number - _ROWS - 1), -1):
            row = self._row(file, at)
            if row["born"] <= until and row["ended"] >= since:
                found.append(Version(int(row["generation"]), int(row["size"])))
        return list(dict.fromkeys(found))

    def history(self, file: int) -> list[dict[str, float]]:
        """Of each version that is remembered: generation, size, since when it was legal and until when."""
        number = int(self._files["rows"][file])
        rows = [self._row(file, at) for at in range(max(0, number - _ROWS), number)]
        return [{field: row[field].item() for field in ("generation", "size", "born", "ended")} for row in rows]

    def _row(self, file: int, number: int) -> Any:
        return self._files["row"][file][number % _ROWS]

    # -- errors, written by who makes them ----------------------------------------------------------------------

    def fail(self, file: int, errno: int) -> None:
        """From now on a reader may get `errno` (ANY: any), until `mend`."""
        entry = self._files[file]
        entry["errno"], entry["mended"], entry["fails"] = errno, _FOREVER, time.monotonic()

    def mend(self, file: int, after: float) -> None:
        """In `after` seconds it may not any more."""
        self._files[file]["mended"] = time.monotonic() + after

    def may_fail(self, file: int, errno: int, since: float, until: float) -> bool:
        """Whether a read between these times may have failed so."""
        entry = self._files[file]
        of_it = int(entry["errno"]) in (errno, ANY)
        return bool(of_it and entry["fails"] <= until and entry["mended"] >= since)

    # -- readers, each of which writes its own ------------------------------------------------------------------

    def reader(self, index: int) -> Any:
        """A reader's counters, and `since` when it has waited for which `file`: 0 if it does not wait."""
        return self._readers[index]

    def total(self, what: str) -> int:
        """A counter, summed up over the readers."""
        return int(self._readers[what].sum())

    def longest(self) -> float:
        """The longest time, in seconds, that a read has taken."""
        return float(self._readers["longest"].max())

    def waiting(self) -> list[tuple[int, int, float]]:
        """Readers that wait: number, file, and for how many seconds."""
        now = time.monotonic()
        found = []
        for index, reader in enumerate(self._readers):
            if since := float(reader["since"]):
                found.append((index, int(reader["file"]), now - since))
        return found
