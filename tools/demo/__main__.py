"""`python -m coordlfs_tools.demo`, which `tools/demo.sh` calls: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from types import FrameType

from coordlfs_tools.demo import sides
from coordlfs_tools.demo.training import Epoch
from coordlfs_tools.lab import photos
from coordlfs_tools.lab.errors import LabError
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

_FILES = 4_400
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_console = Console(highlight=False)


def _mega(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _write_photos(directory: Path, files: int) -> int:
    written = track(photos.write(directory, files), f"writing {files:,} photographs", files, console=_console)
    return sum(path.stat().st_size for path in written)


def _compare(directory: Path, files: int) -> None:
    _console.print("[bold]Preparing[/]: a training on a few photographs, to see how much memory it needs")
    machine = sides.prepare(directory)
    data = directory / "photographs"
    size = _write_photos(data, files)
    _console.print(_conditions(machine, size))
    _console.print("[bold]Training directly[/] on the dataset")
    directly = sides.directly(machine, data, size)
    _console.print("[bold]Training on the mount[/] of the dataset, with the same script")
    mounted = sides.on_mount(machine, data, size)
    _console.print(_table({"directly": directly, "on the mount": mounted.epochs}, size))
    _console.print(_verdict(directly, mounted.epochs, size))
    _console.print(
        f"coordlfs' own processes held {_mega(mounted.overhead)} besides; that does not grow with the cache."
    )


def _conditions(machine: sides.Machine, size: int) -> str:
    cache = int(size * sides.CACHE)
    slow = (
        f"is slowed to {machine.disk_rate / 1e6:.0f} MB/s, as a storage that many nodes share"
        if machine.disk_rate
        else "cannot be slowed by this machine's cgroups: look at the bytes, not at the seconds"
    )
    return (
        f"The dataset has {_mega(size)}. Each side has {_mega(machine.need + cache)} of memory: "
        f"{_mega(machine.need)} that the job needs, and {_mega(cache)}, {sides.CACHE:.0%} of the dataset, "
        "directly as page cache below the job's limit, on the mount as coordlfs' cache. "
        f"The disk {slow}."
    )


def _table(results: dict[str, Sequence[Epoch]], size: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column()
    for column in ("epoch", "seconds", "files/s", "read from disk", "hit rate"):
        table.add_column(column, justify="right")
    for side, epochs in results.items():
        for number, epoch in enumerate(epochs, 1):
            table.add_row(
                side if number == 1 else "",
                str(number),
                f"{epoch.seconds:.1f}",
                f"{epoch.files_per_second:,}",
                _mega(epoch.disk_bytes),
                f"{_hit_rate(epoch, size):.1%}",
            )
        table.add_section()
    return table


def _hit_rate(epoch: Epoch, size: int) -> float:
    if epoch.hit_rate is not None:
        return epoch.hit_rate
    return max(0.0, 1 - epoch.disk_bytes / size)


def _verdict(directly: Sequence[Epoch], mounted: Sequence[Epoch], size: int) -> str:
    """What was gained in the epochs after the first, in which nothing is cached yet."""
    seconds = [mean(epoch.seconds for epoch in epochs[1:]) for epochs in (directly, mounted)]
    read = [mean(epoch.disk_bytes for epoch in epochs[1:]) for epochs in (directly, mounted)]
    return (
        f"[bold]From the second epoch on[/]: {seconds[1]:.1f} s an epoch instead of {seconds[0]:.1f} s, "
        f"[bold]{seconds[0] / seconds[1]:.2f} times as fast[/]; {_mega(read[1])} read from the disk instead of "
        f"{_mega(read[0])}. What does not fit is {_mega(size * (1 - sides.CACHE))}, "
        "beside which whole pages are read, and what the job itself reads again."
    )


def _end(number: int, _: FrameType | None) -> None:
    """End, and clean up undisturbed by further signals."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    """Run the demonstration; the exit status."""
    parser = argparse.ArgumentParser(prog="demo.sh", description=sides.__doc__)
    parser.add_argument(
        "--dir",
        default=os.environ.get("COORDLFS_DEMO_DIR", "/var/tmp"),
        help="where the dataset is written, on a disk; default: COORDLFS_DEMO_DIR or /var/tmp",
    )
    parser.add_argument("--files", type=int, default=_FILES, help="how many photographs (default: %(default)s)")
    arguments = parser.parse_args()
    for number in _SIGNALS:
        signal.signal(number, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="coordlfs-demo-", dir=arguments.dir) as directory:
            os.environ["TMPDIR"] = directory  # for all that PyTorch leaves behind, and the mountpoint
            _compare(Path(directory), arguments.files)
    except (LabError, OSError) as e:
        print(f"demo.sh: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
