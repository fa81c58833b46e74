"""The pages of the reference that are made from the code: the commands from their parsers, the metrics from the table
of the exporter.

Knows the package and Markdown, and nothing of MkDocs (`coordlfs_tools.docs.hooks` does).
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator

from coordlfs.cache.residence import Residence
from coordlfs.commands import cli
from coordlfs.processes import exporter

_WIDTH = 78  # of a usage line, in characters


def commands() -> str:
    """Every command with its usage and options, as `coordlfs COMMAND --help` prints them."""
    listed = cli.commands()
    lines = [
        "# Commands",
        "",
        "This page is made from the parsers of the installed version: it is what `coordlfs COMMAND --help` prints.",
        "A command line that means nothing ends with exit status 2, whatever else fails with 1, an interrupt with 130.",
        "`run` and `analyze` take their own options before `--`, and the command that they start after it.",
        "",
        *_table(
            ("command", "what it does"), [(f"[`{name}`](#coordlfs-{name})", purpose) for name, purpose, _ in listed]
        ),
    ]
    for name, purpose, parser in listed:
        lines += ["", *_command(f"coordlfs {name}", purpose, parser)]
    return "\n".join(lines) + "\n"


def _command(name: str, purpose: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## `{name}` {{ #{name.replace(' ', '-')} }}"
    yield ""
    yield f"{purpose[:1].upper()}{purpose[1:]}."
    yield ""
    yield "```text"
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield textwrap.fill(usage, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    yield "```"
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    rows = [(_spelled(a), _meaning(a, parser)) for a in parser._actions if a not in inner and a.dest != "help"]
    if rows:
        yield ""
        yield from _table(("argument", "meaning"), rows)
    for action in inner:
        for choice in action._choices_actions:
            yield ""
            yield from _command(f"{name} {choice.dest}", choice.help or "", action.choices[choice.dest])


def _spelled(action: argparse.Action) -> str:
    """An argument as it is typed: `--cache-size SIZE`, or `PATH …`."""
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(action.choices or []) or action.dest.upper())
    if not action.option_strings:
        return f"`{value}`" if action.nargs is None else f"`[{value}{' …' if action.nargs == '*' else ''}]`"
    return ", ".join(f"`{f'{option} {value}'.strip()}`" for option in action.option_strings)


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    if action.help is None:
        return {"mountpoint": "the mountpoint", "source": "the dataset's directory"}.get(action.dest, "")
    return action.help % {**vars(action), "prog": parser.prog}


def metrics() -> str:
    """Every metric of `--metrics`, and the field of `status --json` that it shows."""
    lines = [
        "# Metrics",
        "",
        "`coordlfs mount … --metrics [HOST:]PORT` serves these to Prometheus "
        "([how to set it up](../operations.md#prometheus)).",
        "This page is made from the exporter's own table. Every metric has the label `mountpoint`.",
        "",
        "| metric | type | more labels | meaning | field of [`status --json`](status.md) |",
        "|---|---|---|---|---|",
        "| `coordlfs_mount_info` | gauge | `source`, `version`, `residence` | What is mounted, and how: always 1. | |",
        "| `coordlfs_keepers` | gauge | | Processes that hold pins. | `processes.keepers` |",
        *_simple(exporter.GAUGES, "gauge", ""),
        *_simple(exporter.COUNTERS, "counter", "_total"),
        *_rows(exporter.EPOCH, '`epoch="current"` or `"last"`', "epoch"),
        *_rows(exporter.JOB, "`job`, `user`", "hints.jobs"),
        *_rows(exporter.NODE, "`node`", "`coordlfs peers --json`"),
        "| `process_…` | | | Processor time, memory and files of the server, by prometheus-client. | |",
    ]
    return "\n".join(lines) + "\n"


def _simple(table: dict[str, tuple[str, str]], kind: str, suffix: str) -> Iterator[str]:
    said = ""
    for field, (written, says) in table.items():
        name, _, labels = written.rstrip("}").partition("{")
        said = says or said  # of several that differ in a label, one has the words
        yield f"| `coordlfs_{name}{suffix}` | {kind} | {f'`{labels}`' if labels else ''} | {said} | `{field}` |"


def _rows(table: dict[str, tuple[str, str]], labels: str, within: str) -> Iterator[str]:
    for field, (name, says) in table.items():
        yield f"| `coordlfs_{name}` | gauge | {labels} | {says} | `{within}`: `{field}` |"


def residences() -> str:
    """The values of the field `residence`."""
    return " or ".join(f"`{residence}`" for residence in Residence)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    cells = [*head]
    yield f"| {' | '.join(cells)} |"
    yield "|" + "---|" * len(cells)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
