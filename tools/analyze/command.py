"""`coordlfs analyze`: its arguments, its progress, its table, and the files it writes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from coordlfs_tools.analyze import phases, report
from coordlfs_tools.analyze.result import result
from coordlfs_tools.analyze.runs import run
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordlfs.errors import UserError
from coordlfs.sizes import text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `coordlfs analyze` takes, before -- and the command."""
    parser.usage = "coordlfs analyze [OPTIONS] -- COMMAND …"
    parser.add_argument("--data", type=Path, metavar="DIR", help="the dataset's directory (default: what is opened)")
    parser.add_argument("--iterations", type=int, metavar="N", help="to measure in each part of a run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often all is measured (default: 3)")
    parser.add_argument("--loader", type=int, metavar="N", help="which one to measure (default: the first that trains)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report, one HTML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, for programs")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="run the command once, as it is, and only record what it reads"
    )


def command(arguments: argparse.Namespace) -> int:
    """Analyse, show it and write what was asked for; the exit status."""
    _check(arguments)
    if arguments.trace:
        return _trace(arguments)
    console = Console()
    measured = _measure(arguments, console)
    found = result(measured)
    # Everything is made before anything is written: no half of a report.
    page = report.html(found) if arguments.report else None
    _show(found, console)
    if page is not None:
        _write(arguments.report, page)
    if arguments.json:
        _write(arguments.json, json.dumps(found, indent=2) + "\n")
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
        if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"{path} cannot be written: give a file in a directory that exists", 2)


def _measure(arguments: argparse.Namespace, console: Console) -> phases.Measured:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        steps = arguments.rounds + 2
        task = progress.add_task("looking at the command", total=steps, left="")
        scouted = phases.scout(arguments.job, arguments.data, arguments.loader)
        count = phases.iterations(scouted, arguments.iterations)
        each = phases.estimate(scouted, count, 1)
        rounds = []
        notes: list[str] = []
        for number in range(arguments.rounds):
            left = f"about {phases.estimate(scouted, count, arguments.rounds - number):.0f} s left"
            progress.update(task, advance=1, description=f"round {number + 1} of {arguments.rounds}", left=left)
            done, said = phases.measure_round(arguments.job, scouted, count, arguments.loader)
            rounds.append(done)
            notes += said
        progress.update(task, advance=1, description="storage", left=f"about {min(each, 20):.0f} s left")
        storage = phases.measure_storage(scouted, arguments.rounds)
    return phases.Measured(list(arguments.job), scouted, count, rounds, storage, notes)


def _trace(arguments: argparse.Namespace) -> int:
    ran = run(arguments.job, data=arguments.data and arguments.data.resolve(), opens=True, show=True)
    lines = []
    for path in ran.opened:
        if os.path.isfile(path):
            lines.append(f"{os.path.getsize(path)} {path}\n")
    if not lines:
        raise UserError(f"the command read nothing{f' from {arguments.data}' if arguments.data else ''}")
    _write(arguments.trace, "".join(lines))
    return 0


def _write(path: Path, words: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(words)
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
        console.print(found["advice"]["mount"], highlight=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False)


_RATES = {
    "ingestion": ("ingestion G", "minibatches at hand"),
    "prep": ("prep P", "the loader drained, all cached"),
    "fetch": ("fetch F", "the loader drained, cold"),
    "storage": ("storage S", "read as the loader does"),
    "cache": ("cache C", "the same from memory"),
}


def rate_rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, meaning, median and interval of each rate, in words."""
    rows = []
    for name, (label, meaning) in _RATES.items():
        value, spread = found["rates"][name], found["spread"][name]
        if value is None or spread is None:
            rows.append((label, meaning, "not measured", ""))
        elif name in ("storage", "cache"):
            rows.append((label, meaning, f"{text(value)}/s", f"{text(spread[0])} – {text(spread[1])}"))
        else:
            rows.append((label, meaning, f"{value:,.0f} samples/s", f"{spread[0]:,.0f} – {spread[1]:,.0f}"))
    return rows


def _rates(found: dict[str, Any]) -> Table:
    table = Table(title="rates, medians of the rounds", title_justify="left")
    for column in ("", "what it is", "median", "lowest – highest"):
        table.add_column(column, justify="right" if column in ("median", "lowest – highest") else "left")
    for row in rate_rows(found):
        table.add_row(*row)
    return table


def stall_rows(found: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Name, milliseconds of an iteration, share and the share's interval."""
    stalls, spread = found["stalls"], found["spread"]
    rows = []
    for name, label in (("compute", "computing"), ("prep", "waiting for prep"), ("fetch", "waiting for storage")):
        interval = spread.get(f"{name}_share")
        words = f"{interval[0]:.1%} – {interval[1]:.1%}" if interval else ""
        rows.append((label, stalls[f"{name}_seconds"] * 1000, stalls[f"{name}_share"], words))
    return rows


def _stalls(found: dict[str, Any]) -> Table:
    table = Table(title="one iteration, cold", title_justify="left")
    for column in ("", "ms", "share", "lowest – highest", ""):
        table.add_column(column, justify="left" if not column else "right")
    for label, milliseconds, share, interval in stall_rows(found):
        table.add_row(label, f"{milliseconds:,.1f}", f"{share:.1%}", interval, "█" * round(share * 30))
    return table
