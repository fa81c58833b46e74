"""What a benchmark is given and gives back: the context it runs in, and figures with the bounds they have to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from coordlfs_tools.bench import dataset
from coordlfs_tools.lab.machine import disk_of
from rich import box
from rich.console import Console
from rich.table import Table

T = TypeVar("T")
_QUICK_ROUNDS = 2
_WIDTH = 160  # at least, for a Markdown table is no table with its rows folded


@dataclass(frozen=True, slots=True)
class Bound:
    """What the median may be at most, or, with `at_least`, at least."""

    value: float
    at_least: bool = False

    def keeps(self, measured: float) -> bool:
        """Whether `measured` is within the bound."""
        return measured >= self.value if self.at_least else measured <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report: what is compared, one value a round, and the sides' own medians in words."""

    compared: str
    values: Sequence[float]
    bound: Bound | None = None
    sides: str = ""

    @property
    def passes(self) -> bool:
        """Whether the median keeps the bound, if there is one."""
        return self.bound is None or self.bound.keeps(median(self.values))

    def cells(self) -> list[str]:
        """The line, as a table shows it."""
        spread = f" ({_number(min(self.values))} – {_number(max(self.values))})" if len(self.values) > 1 else ""
        verdict = "" if self.bound is None else "pass" if self.passes else "SHORT"
        return [
            self.compared,
            self.sides,
            _number(median(self.values)) + spread,
            str(self.bound or ""),
            verdict,
        ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3f}"


class Context:
    """Where the data lies and how long a benchmark may take."""

    def __init__(self, directory: Path, *, quick: bool, rounds: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.disk = disk_of(directory)
        self.quick = quick
        self.console = Console()
        if self.console.width < _WIDTH:
            self.console.width = _WIDTH
        self._rounds = rounds

    def rounds(self, usual: int) -> int:
        """How often the sides take turns."""
        return self._rounds or (_QUICK_ROUNDS if self.quick else usual)

    def images(self) -> dataset.Images:
        """The data set of images: 20,000 files, or 1,500 in a quick run."""
        return dataset.images(self.directory, 1_500 if self.quick else 20_000)

    def names(self) -> tuple[Path, int]:
        """The tree of names, and how many files it has: a million, or 20,000 in a quick run."""
        files = 20_000 if self.quick else 1_000_000
        return dataset.names(self.directory, files), files

    def say(self, text: str) -> None:
        """Show that it goes on."""
        self.console.print(text, style="dim", highlight=False)


def alternate(context: Context, rounds: int, sides: Mapping[str, Callable[[int], T]]) -> dict[str, list[T]]:
    """Every side once a round, given the round's number; what they returned. Who goes first changes every round."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            results[name].append(sides[name](number))
            result = results[name][-1]
            shown = _number(result) if isinstance(result, float) else result
            context.say(f"  round {number + 1} of {rounds}, {name}: {shown}")
    return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, for each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def table(title: str, figures: Sequence[Figure]) -> Table:
    """The figures of one benchmark; as Markdown, so that it can be shown anywhere."""
    result = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for column in ("compared", "medians of the sides", "median (lowest – highest)", "bound", ""):
        result.add_column(column, overflow="fold")
    for figure in figures:
        result.add_row(*figure.cells())
    return result
