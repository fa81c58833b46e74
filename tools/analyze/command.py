"""`coordlfs analyze`: its arguments, its progress, its tables, and the files it writes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordlfs_tools.analyze import report, rounds, scout
from coordlfs_tools.analyze.result import result
from coordlfs_tools.analyze.runs import run
from coordlfs_tools.analyze.words import duration, rate_rows, stall_rows
from coordlfs_tools.simulate.traces import line
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from coordlfs.commands.choice import FITS
from coordlfs.errors import UserError

_STORAGE = 16.0  # seconds that measuring the storage takes, about
_STDOUT = Path("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `coordlfs analyze` takes, before -- and the command."""
    parser.usage = "coordlfs analyze [OPTIONS] -- COMMAND …"
    parser.add_argument("--data", type=Path, metavar="DIR", help="the dataset's directory (default: what is opened)")
    parser.add_argument("--iterations", type=int, metavar="N", help="to measure in each part of a run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often all is measured (default: 3)")
    parser.add_argument("--loader", type=int, metavar="N", help="which one to measure (default: the first that trains)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report, one HTML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures; - prints them, and no table")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="run the command once, as it is, and only record what it reads"
    )


def command(arguments: argparse.Namespace) -> int:
    """Analyse, show it and write what was asked for; the exit status."""
    _check(arguments)
    with _ended_by_signals():
        if arguments.trace:
            return _trace(arguments)
        found = result(_measure(arguments, Console(stderr=True)))
    # Everything is made before anything is written: no half of a report.
    page = report.html(found) if arguments.report else None
    words = json.dumps(found, indent=2) + "\n"
    if arguments.json == _STDOUT:
        sys.stdout.write(words)
    else:
        _show(found, Console())
    if page is not None:
        _write(arguments.report, page)
    if arguments.json and arguments.json != _STDOUT:
        _write(arguments.json, words)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.job:
        raise UserError("analyze needs a command: coordlfs analyze -- python train.py", 2)
    if arguments.iterations is not None and arguments.iterations < 1:
        raise UserError(f"--iterations {arguments.iterations} measures nothing: give at least 1", 2)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds} measures nothing: give at least 1", 2)
    if arguments.data and not arguments.data.is_dir():
        what = "is not a directory" if arguments.data.exists() else "does not exist"
        raise UserError(f"--data {arguments.data} {what}: give the dataset's directory", 2)
    for path in filter(None, (arguments.report, arguments.json, arguments.trace)):
        place = path.absolute().parent
        if path != _STDOUT and (path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK)):
            raise UserError(f"{path} cannot be written: give a file in a directory that exists", 2)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Who is told to end ends what it started."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bar:
    """A bar that moves with the time which everything is estimated to take."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("the first, short run", total=None)
        self._begun = 0.0
        self._done = 0.0  # estimated seconds of the steps that are over
        self._step = 0.0

    def plan(self, seconds: float) -> None:
        """All steps together are estimated to take so long."""
        self._progress.update(self._task, total=seconds)

    def step(self, what: str, seconds: float) -> None:
        """The next step, estimated to take so long."""
        self._done += self._step
        self._step, self._begun = seconds, time.monotonic()
        self._progress.update(self._task, description=what)
        self.tick()

    def tick(self) -> None:
        """Look at the clock."""
        if self._step:
            passed = min(time.monotonic() - self._begun, self._step)
            self._progress.update(self._task, completed=self._done + passed)


def _measure(arguments: argparse.Namespace, console: Console) -> rounds.Measured:
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = _Bar(progress)
        scouted = scout.scout(arguments.job, arguments.data, arguments.loader, bar.tick)
        count = rounds.iterations(scouted, arguments.iterations)
        each = rounds.estimate(scouted, count)
        whole = arguments.rounds * each + (_STORAGE if scouted.files else 0)
        console.print(
            f"{scouted.kind}: {arguments.rounds} rounds of {count} iterations a part, about {duration(whole)}",
            style="dim",
            highlight=False,
        )
        bar.plan(whole)
        done = []
        notes: list[str] = []
        for number in range(arguments.rounds):
            bar.step(f"round {number + 1} of {arguments.rounds}", each)
            one, said = rounds.measure_round(arguments.job, scouted, count, arguments.loader, bar.tick)
            done.append(one)
            notes += said
        bar.step("storage", _STORAGE)
        storage = rounds.measure_storage(scouted, arguments.rounds)
    return rounds.Measured(list(arguments.job), scouted, count, done, storage, notes)


def _trace(arguments: argparse.Namespace) -> int:
    ran = run(arguments.job, data=arguments.data and arguments.data.resolve(), opens=True, show=True)
    names = [path for path in map(os.path.realpath, ran.opened) if os.path.isfile(path)]
    # What native code opened is as much as one item of a trace, whatever it reads: nothing can be told from that.
    native = _bytes(ran.held - set(names))
    if native > _bytes(set(names)):
        largest = max(ran.held - set(names), key=os.path.getsize)
        raise UserError(
            f"the command reads its data by native code (such as HDF5, LMDB, Arrow or DALI), of which a trace sees "
            f"nothing: {largest} was open or mapped. Analyse it without --trace: coordlfs analyze --data DIR"
        )
    if not names:
        raise UserError(
            f"the command opened no file{f' in {arguments.data}' if arguments.data else ''} by Python; "
            "what native code opens and closes again is not seen by a trace"
        )
    _write(arguments.trace, b"".join(line(os.path.getsize(path), path) for path in names))
    return 0


def _bytes(paths: set[str]) -> int:
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def _write(path: Path, words: str | bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(words if isinstance(words, bytes) else words.encode(errors="surrogateescape"))
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {e.strerror}") from e


def _show(found: dict[str, Any], console: Console) -> None:
    for number, sentence in enumerate(found["verdict"]):
        console.print(sentence, style="bold" if not number else "", highlight=False)
    console.print(_rates(found))
    console.print(_stalls(found))
    if found["advice"]["mount"]:
        if found["advice"]["pin"]:
            console.print(found["advice"]["pin"], highlight=False, soft_wrap=True)
            console.print(f"or, with a file system in between ({FITS}):", style="dim", highlight=False, soft_wrap=True)
        console.print(found["advice"]["mount"], highlight=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False)


def _rates(found: dict[str, Any]) -> Table:
    table = Table(title="rates, medians of the rounds", title_justify="left")
    for column in ("", "what it is", "median", "lowest – highest"):
        table.add_column(column, justify="right" if column in ("median", "lowest – highest") else "left")
    for row in rate_rows(found):
        table.add_row(*row)
    return table


def _stalls(found: dict[str, Any]) -> Table:
    table = Table(title="one iteration, cold", title_justify="left")
    for column in ("", "ms", "share", "lowest – highest"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("")
    for label, milliseconds, share, interval in stall_rows(found):
        table.add_row(label, f"{milliseconds:,.1f}", f"{share:.1%}", interval, "█" * round(share * 30))
    return table
