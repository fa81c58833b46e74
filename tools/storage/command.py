"""`coordlfs bench storage`: its arguments and its table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from coordlfs_tools.storage.files import listed
from coordlfs_tools.storage.measure import device_of, measure
from rich.console import Console
from rich.table import Table

from coordlfs.sizes import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `coordlfs bench` takes."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    storage = benches.add_parser("storage", help="read DIR as a training job does, cold and warm")
    storage.add_argument("directory", type=Path, metavar="DIR", help="the dataset's directory; it is only read")
    storage.add_argument("--readers", type=_positive, default=4, metavar="N", help="at once (default: 4)")
    storage.add_argument("--seconds", type=_seconds, default=2.0, metavar="S", help="of each measurement (default: 2)")
    storage.add_argument("--rounds", type=_positive, default=3, metavar="N", help="default: 3")
    storage.add_argument("--json", action="store_true", help="stable figures, for programs")


def _positive(words: str) -> int:
    number = int(words)
    if number < 1:
        raise ValueError
    return number


def _seconds(words: str) -> float:
    number = float(words)
    if not 0.05 <= number <= 3600:
        raise ValueError
    return number


_positive.__name__, _seconds.__name__ = "number", "number of seconds"  # what argparse calls what it refuses


def command(arguments: argparse.Namespace) -> int:
    """Measure, and show it; the exit status."""
    files = listed(arguments.directory)
    rates = measure(files, arguments.readers, seconds=arguments.seconds, rounds=arguments.rounds)
    measured = {
        "storage": rates.storage,
        "storage_most": rates.most,
        "storage_latency": rates.latency,
        "cache": rates.cache,
    }
    if arguments.json:
        figures = {
            "version": 1,
            **{name: median(values) for name, values in measured.items()},
            "rounds": measured,
            "readers": arguments.readers,
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "device": device_of(arguments.directory),
            "notes": rates.notes,
        }
        print(json.dumps(figures, indent=2))
        return 0
    table = Table(
        title=f"{arguments.directory}: {len(files):,} files, {text(sum(f.size for f in files))}, "
        f"{device_of(arguments.directory)}",
        title_justify="left",
    )
    for column in ("read from", "readers", "a second", "lowest – highest"):
        table.add_column(column, justify="left" if column == "read from" else "right")
    for name, readers, values in (
        ("storage (S)", arguments.readers, rates.storage),
        ("storage, many readers", 4 * arguments.readers, rates.most),
        ("memory (C)", arguments.readers, rates.cache),
    ):
        table.add_row(name, str(readers), text(median(values)), f"{text(min(values))} – {text(max(values))}")
    low, middle, high = (1000 * pick(rates.latency) for pick in (min, median, max))
    read = f"storage, one read of {text(rates.read_bytes)}"
    table.add_row(read, "1", f"{middle:.2f} ms", f"{low:.2f} – {high:.2f} ms")
    console = Console()
    console.print(table)
    for note in rates.notes:
        console.print(note, style="dim", highlight=False)
    return 0
